"""A newcomer can follow one call: it passes through few files, few functions, and few frames at a time."""

import re

import torch

import drpo_kernels as dk
from launcher import ROOT
from one_call import passage
from problems import random_problem

# A call may take at most these numbers, and they may only become smaller.
FILES, FUNCTIONS, FRAMES = 24, 165, 12


def forward_and_backward():
    problem = random_problem(0, bias=True)
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    rest = problem.targets, problem.old_logprobs, problem.advantages, problem.mask
    dk.linear_policy_loss(*leaves[:2], *rest, bias=leaves[2], backend="torch").loss.backward()
    assert all(torch.is_tensor(leaf.grad) for leaf in leaves)


def test_one_call_passes_through_few_files_and_frames():
    forward_and_backward()
    files, functions, deepest = passage(forward_and_backward)
    assert len(files) <= FILES, files
    assert len(functions) <= FUNCTIONS, functions
    assert len(deepest) <= FRAMES, deepest


def test_the_count_is_that_of_the_package_alone():
    """Here `clamped_shift` calls the unclamped shift and the ratio minus one, which calls the log-ratio."""
    assert passage(lambda: sorted(map(abs, range(3)))) == ([], [], [])
    tokens = dk.Tokens(torch.zeros(2), torch.zeros(2), torch.ones(2))
    files, functions, deepest = passage(lambda: tokens.clamped_shift)
    assert files == ["tokens.py"]
    assert [name.split()[-1] for name in deepest] == ["clamped_shift", "ratio_minus_one", "log_ratio"]
    assert len(functions) == 4 and set(deepest) < set(functions)


def defined(file):
    """Return the source of the files of the package that have this path or whose path ends in it."""
    found = [path for path in (ROOT / "drpo_kernels").rglob("*.py") if str(path).endswith(f"/{file}")]
    assert found, file
    return "\n".join(path.read_text(encoding="utf-8") for path in found)


def test_the_page_and_its_picture_name_what_exists():
    """A name in brackets behind a file is defined in that file, and so is a name behind a file in the picture."""
    page = (ROOT / "docs" / "one-call.md").read_text(encoding="utf-8")
    named = [
        (file, name)
        for file, names in re.findall(r"`([\w/]+\.py)`\s\(([^)]*)\)", page)
        for name in re.findall(r"`([\w.]+)`", names)
    ]
    picture = (ROOT / "docs" / "one-call.svg").read_text(encoding="utf-8")
    drawn = [
        (file, name)
        for file, names in re.findall(r"([\w/]+\.py)\s+·\s+([\w., ]+)", picture)
        for name in re.findall(r"[\w.]+", names)
        if name != "or"
    ]
    assert len(named) >= 15 and len(drawn) >= 12
    for file, name in named + drawn:
        source = defined(file)
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b|^{part} = ", source, re.MULTILINE), (file, name)
    for file in re.findall(r"`([\w/]+\.py)`", page):
        assert defined(file)
