"""Tests of what the studies share: records on disk, tables, blocks of pages, command lines."""

import importlib.util
import re

import pytest
import torch

from benchmarks import report
from benchmarks.harness import blocks, cli, records
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.quantization import dequantized, per_block, per_tensor
from benchmarks.harness.tables import size, table, three_figures, two_figures


def test_a_table_is_aligned_and_its_cells_stay_text():
    text = table(("what", "n"), [("mean |x|", "1.50"), ("b", 10)])
    assert text.splitlines() == [
        "| what               |    n |",
        "|:-------------------|-----:|",
        "| mean &#124;x&#124; | 1.50 |",
        "| b                  |   10 |",
    ]


@pytest.mark.parametrize(("left", "dashes"), [(0, "|--:|--:|"), (1, "|:--|--:|"), (2, "|:--|:--|")])
def test_the_first_columns_are_left(left, dashes):
    assert re.sub("-+", "--", table(("a", "b"), [("1", "2")], left).splitlines()[1]) == dashes


def test_numbers():
    assert [three_figures(value) for value in (1.234, 12.34, 1234.5)] == ["1.23", "12.3", "1234"]
    assert [two_figures(value) for value in (0.1234, 2e-5, 93.4, float("nan"))] == ["0.12", "2e-5", "93", "NaN"]
    assert [size(count) for count in (None, 3 << 20, 10 << 30)] == ["–", "3 MiB", "10.0 GiB"]


def test_one_part_is_replaced(tmp_path):
    path = tmp_path / "lines.jsonl"
    records.replace_part(path, "a", [])
    assert not path.exists()
    records.write(path, [{"part": "a", "n": 1}, {"part": "b", "n": 2}, {"part": "a", "n": 3}])
    records.replace_part(path, "a", [{"part": "a", "n": 4}])
    assert [record["n"] for record in records.read(path)] == [2, 4]
    records.replace_part(path, "c", [{"part": "c", "n": 5}, {"part": "c", "n": 6}], order="cab")
    assert [record["n"] for record in records.read(path)] == [5, 6, 4, 2]
    records.replace_part(path, "b", [])
    assert [record["n"] for record in records.read(path)] == [5, 6, 4]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    records.write(path, [{"n": 1}])
    with pytest.raises(TypeError):
        records.write(path, [{"n": 2}, {"n": object()}])
    assert records.read(path) == [{"n": 1}]


def test_a_line_separator_inside_a_string_does_not_end_a_line(tmp_path):
    records.write(tmp_path / "lines.jsonl", [{"text": "δ\u2028τ"}])
    assert records.read(tmp_path / "lines.jsonl") == [{"text": "δ\u2028τ"}]


@pytest.mark.parametrize(("arguments", "command"), [
    ("", "python -m benchmarks.toy"),
    ("--quick --many-words a b --out somewhere", "python -m benchmarks.toy --many-words a b --quick"),
    ("--rounds 3 --device cuda", "python -m benchmarks.toy --device cuda --rounds 3"),
    ("--rounds 7 --device cpu", "python -m benchmarks.toy"),
])  # fmt: skip
def test_a_command_names_what_is_not_at_its_default(arguments, command):
    parser = cli.parser("benchmarks.toy", "a toy")
    cli.add_device(parser, "cpu")
    cli.add_quick(parser, "tiny")
    cli.add_out(parser, ROOT / "bench_results" / "toy.jsonl")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--many-words", nargs="+")
    options = parser.parse_args(arguments.split())
    assert cli.command(parser, options) == command
    assert parser.parse_args(command.split()[3:]).rounds == options.rounds


def test_a_rehearsal_is_written_only_where_out_says(tmp_path):
    parser = cli.parser("benchmarks.toy", "a toy")
    cli.add_quick(parser, "tiny")
    cli.add_out(parser, None)
    outs = [cli.results(parser.parse_args(text.split()), tmp_path) for text in ("", "--quick", "--quick --out here")]
    assert [None if out is None else out.name for out in outs] == [tmp_path.name, None, "here"]


@pytest.mark.parametrize("block", report.BLOCKS.values(), ids=report.BLOCKS)
def test_a_block_has_its_place_and_its_module(block):
    """The page has both markers once, and the module that measures can be run."""
    page = (ROOT / block.page).read_text(encoding="utf-8")
    assert [page.count(marker) for marker in block.markers] == [1, 1]
    spec = importlib.util.find_spec(block.module)
    assert spec.origin is not None or importlib.util.find_spec(f"{block.module}.__main__")
    results = ROOT / "bench_results" / block.results
    if results.is_file():
        assert records.read(results)[0]["benchmark"] == block.benchmark


def test_only_what_is_between_the_markers_changes(tmp_path):
    page = tmp_path / "page.md"
    start, end = blocks.markers("toys", "one")
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    assert blocks.rewrite(page, (start, end), r"new \1")
    assert page.read_text() == f"before\n{start}\nnew \\1\n{end}\nafter\n"
    assert not blocks.rewrite(page, blocks.markers("toys", "two"), "new")


def test_scales_cover_what_they_say():
    x = torch.randn(150, 200, generator=torch.Generator().manual_seed(14))
    form = torch.float8_e4m3fn
    assert torch.equal(per_tensor(x, form).scales, x.abs().max().reshape(1, 1) / 448)
    for rows, shape in ((1, (150, 2)), (128, (2, 2))):
        found = per_block(x, form, rows)
        assert found.scales.shape == shape
        for i in range(shape[0]):
            for j in range(2):
                block = slice(i * rows, (i + 1) * rows), slice(j * 128, (j + 1) * 128)
                alone = per_tensor(x[block], form)
                assert torch.equal(found.scales[i, j], alone.scales[0, 0])
                assert torch.equal(dequantized(found, rows)[block], dequantized(alone))
