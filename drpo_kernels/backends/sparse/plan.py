"""How the sweep of `sparse_grad` cuts its rows: as if all were dense, with memory for the entries of sparse ones."""

from dataclasses import dataclass

from drpo_kernels.backends.devices import DeviceProperties
from drpo_kernels.backends.planning import (
    NeedsGrad,
    Sizes,
    Storage,
    SweepPlan,
    cut,
    equal_chunks,
    weight_gradient,
    workspace_bytes,
)

# An entry takes so many bytes while it is sorted by column and added.
ENTRY_BYTES = 80


@dataclass(frozen=True)
class SparsePlan(SweepPlan):
    """A plan in which up to `entries` entries of sparse rows wait until they are added together."""

    entries: int = 0

    @property
    def in_place(self) -> bool:
        """Only a CPU works in place. A GPU would move a dense row over one that another program still reads."""
        return super().in_place and self.on_cpu

    @property
    def held_bytes(self) -> int:
        return super().held_bytes + ENTRY_BYTES * self.entries

    def sparse_chunk_rows(self, limit: int) -> int:
        """Rows of a chunk that may all have `limit` entries. An entry that still waits, unsorted, takes half of
        ENTRY_BYTES.
        """
        return max(2 * self.entries // (limit + 1), 1)

    def _choices(self) -> list[tuple[str, int | None, str]]:
        *choices, together = super()._choices()
        reason = f"{self.entries} of sparse rows, before they are added"
        return [*choices, ("entries", ENTRY_BYTES * self.entries, reason), together]


def sparse_plan(
    device: DeviceProperties,
    sizes: Sizes,
    storage: Storage,
    needs_grad: NeedsGrad,
    *,
    workspace: int | None = None,
    row_multiple: int = 1,
    main_grad: bool = False,
) -> SparsePlan:
    """`planning.plan` for `sparse_grad`. dW is always a sum, and entries take a quarter of the workspace beside it."""
    in_place = storage.logits == storage.dlogits and device.type == "cpu"
    beside = 0 if in_place or not sizes.active else storage.dlogits.itemsize
    budget = workspace_bytes(device, sizes.vocab, storage.logits.itemsize + beside, workspace)
    # Few rows wait for a window, and every chunk waits for the host: half of the budget is for logits.
    windows, chunk_rows, most = cut(sizes, storage, budget, beside, 2, row_multiple)
    how = weight_gradient(storage, needs_grad.weight, main_grad, at_once=False)
    return SparsePlan(
        sizes, storage, windows, chunk_rows, equal_chunks(sizes.forward, most), False, how, device.type == "cpu",
        entries=budget // 4 // ENTRY_BYTES,
    )  # fmt: skip
