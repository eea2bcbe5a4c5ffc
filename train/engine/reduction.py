"""What must not depend on how slots are spread over processes: buffers, and with --reduction exact the gradients.

Float addition commutes but does not associate, so the bits of a sum depend on its tree. Here the tree is fixed by the
number of slots: a balanced binary one over the slots in their order. A process adds up the subtree of its own slots;
then processes exchange subtrees by recursive doubling, and each of them computes the same upper levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.distributed as dist


class ExactReduction:
    """Collects the gradients of this process's slots and leaves the sum over all slots in the parameters."""

    def __init__(self, parameters: Sequence[torch.Tensor], rank: int, num_processes: int) -> None:
        self._parameters = parameters
        self._dtype = reduce(torch.promote_types, [parameter.dtype for parameter in parameters])
        self._rank = rank
        self._num_processes = num_processes
        self._tree: list[tuple[int, torch.Tensor]] = []  # (level, sum) of finished subtrees, left to right
        self._spare: list[torch.Tensor] = []

    def add(self) -> None:
        """Take the gradient of the next slot out of the parameters and put it into the tree."""
        flat = self._buffer()
        for parameter, part in zip(self._parameters, self._split(flat)):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad.reshape(-1))
            parameter.grad = None
        level = 0
        while self._tree and self._tree[-1][0] == level:
            _, left = self._tree.pop()
            self._spare.append(flat)
            flat = left.add_(flat)
            level += 1
        self._tree.append((level, flat))

    def finish(self) -> None:
        """Exchange subtrees with the other processes and set the gradients; the tree is empty again then."""
        ((_, total),) = self._tree
        self._tree.clear()
        distance = 1
        while distance < self._num_processes:
            partner = self._rank ^ distance
            received = self._buffer()
            sending = dist.P2POp(dist.isend, total, partner)
            for work in dist.batch_isend_irecv([sending, dist.P2POp(dist.irecv, received, partner)]):
                work.wait()
            # a + b and b + a have the same bits, so both partners go on with the same sum.
            total.add_(received)
            self._spare.append(received)
            distance *= 2
        for parameter, part in zip(self._parameters, self._split(total)):
            parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))
        self._spare.append(total)

    def _buffer(self) -> torch.Tensor:
        if self._spare:
            return self._spare.pop()
        size = sum(parameter.numel() for parameter in self._parameters)
        return torch.empty(size, dtype=self._dtype, device=self._parameters[0].device)

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return list(flat.split([parameter.numel() for parameter in self._parameters]))


def share_buffers(buffers: list[torch.Tensor], of_slot_0: list[torch.Tensor] | None, num_processes: int) -> None:
    """Give all processes the buffers (batch norm's averages, say) as slot 0 left them.

    Args:
        buffers: of the model, as the last slot left them.
        of_slot_0: copies from right after slot 0; on rank 0 only.
        num_processes: of the run; all of them must call this.
    """
    if of_slot_0:
        torch._foreach_copy_(buffers, of_slot_0)
    if num_processes == 1:
        return
    for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
        same = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.reshape(-1) for buffer in same])
        dist.broadcast(flat, src=0)
        for buffer, part in zip(same, flat.split([buffer.numel() for buffer in same])):
            buffer.copy_(part.view_as(buffer))
