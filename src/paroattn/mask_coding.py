"""The masks of a plan as its file holds them (docs/plan-format.md): small, and decoded in bounded memory.

The masks of one head, one per step bucket, differ little. So they are stored together, as one image: a pixel per block
says which of the masks keep it, through a palette of the patterns that occur; zstandard does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
import zstandard
from torch import Tensor

from paroattn.block_mask import block_count, pack_bits, visual_blocks
from paroattn.errors import PlanError
from paroattn.grid import TokenGrid

STACK_MASKS = 16
"""Most masks of a stack: a pattern has a bit for each."""
PATTERNS = 256
"""Most patterns of a stack: a pixel is a byte."""
WINDOW_BYTES = 2**23
"""Most of what was decoded that a frame may refer to, which a decoder keeps in memory."""
# Optimal parsing, but hardly any search: a sixth less than zstandard's level 6, where level 16 takes ten times as long.
_COMPRESSION = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_BTOPT, window_log=21, chain_log=17, hash_log=17, search_log=1, target_length=64
)
_STRIP_BYTES = 2**19  # pixels that are decoded at once: they stay in a core's cache
_THREADS = 8
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class MaskRules:
    """What every mask of a plan has to obey.

    Attributes:
        rows, columns: blocks of queries and of keys.
        row_bytes: bytes of a row of blocks, ceil(columns / 8).
    """

    def __init__(self, grid: TokenGrid, block_q: int, block_kv: int):
        self.rows, self.columns = block_count(grid.tokens, block_q), block_count(grid.tokens, block_kv)
        self.row_bytes = -(-self.columns // 8)
        visual_rows, visual_columns = visual_blocks(grid, block_q, block_kv)
        text = torch.arange(self.columns) >= visual_columns.stop
        self._row_numbers = np.arange(self.rows)
        self._diagonal = self._row_numbers * self.row_bytes // self.rows  # bytes of the nearest keys
        self._text_start = visual_rows.stop, visual_columns.stop // 8  # of rows of blocks, and of bytes of a row
        self._text_row = pack_bits(torch.ones(self.columns, dtype=torch.bool)).numpy()
        self._text_bytes = pack_bits(text).numpy()[self._text_start[1] :]

    def check(self, masks: Tensor, first: int = 0) -> None:
        """Raise `PlanError` unless all masks obey; in parallel, and without a copy of them all.

        Args:
            masks: uint8 [masks, q blocks, row bytes], see `paroattn.block_mask.pack_bits`.
            first: number of the first of them in the plan, for the message.
        """
        bits = masks.numpy()
        _in_parallel(lambda number: self.check_one(bits[number], first + number), range(len(bits)))

    def check_one(self, mask: np.ndarray, number: int) -> None:
        """Raise `PlanError` unless a mask, uint8 [q blocks, row bytes], obeys; `number` is for the message."""
        if self.columns % 8 and (mask[:, -1] >> (self.columns % 8)).any():
            raise PlanError(f"mask {number} has bits beyond its {self.columns} kv blocks; expected zeros there")
        rows = np.flatnonzero(mask[self._row_numbers, self._diagonal] == 0)  # few: nearly all keep a near key
        if len(rows):
            kept = np.bitwise_or.reduceat(mask[rows].reshape(-1), self._row_numbers[: len(rows)] * self.row_bytes)
            if not kept.all():  # a fifth of the time of any(-1)
                raise PlanError(f"mask {number} keeps no block in row {rows[kept.argmin()]}; every row needs one")
        row, byte = self._text_start
        if (mask[row:] != self._text_row).any() or (~mask[:, byte:] & self._text_bytes).any():
            raise PlanError(f"mask {number} skips a block that touches text tokens; those are always computed")


def encode_masks(table: Tensor, index: Tensor) -> dict[str, Tensor]:
    """The tensors of a plan file that hold its masks, in the order in which layers, heads and buckets use them.

    Args:
        table: uint8 [masks, q blocks, row bytes]; masks that are not used are left out.
        index: int32 [step buckets, layers, heads] into table.

    Returns:
        mask_index: int32 [step buckets, layers, heads], into the masks of the stacks, one after the other.
        mask_stacks: int64 [stacks, 4], of each its masks, its patterns, 1 if its image lies column by column (else 0),
            and the bytes of its frame.
        mask_data: uint8 [bytes], the frames of all stacks.
    """
    buckets = len(index)
    uses = index.permute(1, 2, 0).flatten().numpy()
    numbers, first_use, renumbered = np.unique(uses, return_index=True, return_inverse=True)
    in_order = np.argsort(first_use)
    new_numbers = np.argsort(in_order).astype(np.int32)
    heads = [list(items) for _, items in groupby(in_order, lambda number: first_use[number] // buckets)]
    groups = [
        numbers[items[start : start + STACK_MASKS]] for items in heads for start in range(0, len(items), STACK_MASKS)
    ]
    bits = table.numpy()
    stacks = [stack for part in _in_parallel(lambda group: _encode(bits, group), groups) for stack in part]
    mask_index = torch.from_numpy(new_numbers[renumbered].reshape(*index.shape[1:], buckets))
    return {
        "mask_index": mask_index.permute(2, 0, 1).contiguous(),
        "mask_stacks": torch.tensor([[*numbers, len(frame)] for *numbers, frame in stacks]),
        "mask_data": torch.frombuffer(bytearray().join(frame for *_, frame in stacks), dtype=torch.uint8),
    }


def _encode(table: np.ndarray, numbers: np.ndarray) -> list[tuple[int, int, int, bytes]]:
    """Stacks of some masks: what `encode_masks` says of each, and its frame; one unless they have too many patterns."""
    kept_by = np.zeros((table.shape[1], 8 * table.shape[2]), np.uint16)
    for bit, number in enumerate(numbers):
        kept_by |= np.unpackbits(table[number], axis=-1, bitorder="little").astype(np.uint16) << np.uint16(bit)
    occurs = np.zeros(2 ** len(numbers), bool)
    occurs[kept_by] = True
    palette = np.flatnonzero(occurs).astype("<u2")
    if len(palette) > PATTERNS:
        half = len(numbers) // 2
        return _encode(table, numbers[:half]) + _encode(table, numbers[half:])
    pixels = (np.cumsum(occurs) - 1).astype(np.uint8)[kept_by]
    down, across = (np.count_nonzero(np.diff(pixels, axis=axis)) for axis in (0, 1))
    along_columns = down < 0.9 * across  # decoding it takes longer, too
    content = palette.tobytes() + (pixels.T if along_columns else pixels).tobytes()
    frame = zstandard.ZstdCompressor(compression_params=_COMPRESSION).compress(content)
    return [(len(numbers), len(palette), int(along_columns), frame)]


def check_stacks(stacks: Tensor, data_bytes: int, masks: int) -> None:
    """Raise `PlanError` unless the list of stacks, int64 [stacks, 4], fits the data and the plan's index of masks."""
    limits = (("masks", 1, STACK_MASKS), ("patterns", 1, PATTERNS), ("as layout", 0, 1), ("bytes", 1, data_bytes))
    for column, (name, least, most) in zip(stacks.unbind(1), limits, strict=True):
        wrong = ((column < least) | (column > most)).nonzero()
        if len(wrong):
            raise PlanError(
                f"mask_stacks says that stack {int(wrong[0])} has {int(column[wrong[0]])} {name}; expected {least} to "
                f"{most}"
            )
    if int(stacks[:, 3].sum()) != data_bytes:
        raise PlanError(f"mask_stacks counts {int(stacks[:, 3].sum())} bytes; mask_data has {data_bytes}")
    if int(stacks[:, 0].sum()) != masks:
        raise PlanError(f"mask_stacks counts {int(stacks[:, 0].sum())} masks; mask_index uses {masks}")


def decode_masks(stacks: Tensor, data: Tensor, rules: MaskRules) -> Tensor:
    """Undo `encode_masks`, for lists that `check_stacks` has found right.

    Memory beyond the result is bounded, and a stack whose masks break a rule ends it at once.

    Args:
        stacks, data: "mask_stacks" and "mask_data".
        rules: of the plan's grid and blocks.

    Returns:
        uint8 [masks, q blocks, row bytes].

    Raises:
        PlanError: a frame that cannot be decoded, or a mask that is none.
    """
    starts = torch.nn.functional.pad(stacks[:, [0, 3]].cumsum(0), (0, 0, 1, 0)).tolist()  # pairs of masks and bytes
    frames = data.numpy().data
    size = (starts[-1][0], rules.rows, rules.row_bytes)
    try:
        table = np.empty(size, np.uint8)  # takes no memory until it is filled, then in large pages, unlike torch.empty
    except MemoryError as error:
        raise PlanError(f"there is no memory for its masks, {math.prod(size) / 1e9:.1f} GB") from error

    def decode(number: int) -> None:
        (first, start), (end, stop) = starts[number : number + 2]
        _, patterns, along_columns, _ = stacks[number].tolist()
        try:
            _decode(frames[start:stop], patterns, bool(along_columns), rules, table[first:end])
        except (zstandard.ZstdError, PlanError) as error:
            raise PlanError(f"stack {number} of masks cannot be decoded: {error}") from error
        for mask in range(first, end):
            rules.check_one(table[mask], mask)

    _in_parallel(decode, range(len(stacks)))
    return torch.from_numpy(table)


def _decode(frame: memoryview, patterns: int, along_columns: bool, rules: MaskRules, masks: np.ndarray) -> None:
    """Fill masks, uint8 [masks, q blocks, row bytes], from a stack's frame."""
    height, width = rules.rows, 8 * rules.row_bytes
    expected, said = 2 * patterns + height * width, zstandard.frame_content_size(frame)
    if said != expected:
        raise PlanError(f"its frame is for {said if said >= 0 else 'unknown'} bytes; expected {expected}")
    reader = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).stream_reader(frame)
    palette = np.zeros(PATTERNS, "<u2")
    _fill(reader, palette[:patterns].view(np.uint8))
    halves = [_pair_table((palette >> shift).astype(np.uint8)) for shift in range(0, len(masks), 8)]
    lines, length = (width, height) if along_columns else (height, width)  # of the image as it lies in the frame
    count = max(8, _STRIP_BYTES // length // 8 * 8)  # lines of a strip: columns come in whole bytes
    buffers = np.empty((4, count * length), np.uint8)  # for all strips: arrays of this size take long to be allocated
    for start in range(0, lines, count):
        end = min(start + count, lines)
        pixels, turned, kept_by, bits = buffers[:, : (end - start) * length]
        _fill(reader, pixels)
        if int(pixels.max()) >= patterns:
            raise PlanError(f"a pixel is {int(pixels.max())}; expected less than its {patterns} patterns")
        if along_columns:
            np.copyto(turned.reshape(height, -1), pixels.reshape(-1, height).T)
            pixels = turned
        parts = masks[:, :, start // 8 : end // 8] if along_columns else masks[:, start:end]
        for number, part in enumerate(parts):
            if number % 8 == 0:
                np.take(halves[number // 8], pixels.view(np.uint16), out=kept_by.view(np.uint16), mode="clip")
            np.bitwise_and(kept_by, np.uint8(1 << number % 8), out=bits)
            part[...] = np.packbits(bits, bitorder="little").reshape(part.shape)


def _pair_table(palette: np.ndarray) -> np.ndarray:
    """A table of two pixels at once, uint16 [65536], which is twice as fast as one of single pixels, uint8 [256]."""
    pairs = np.empty((PATTERNS, PATTERNS, 2), np.uint8)
    pairs[..., 0], pairs[..., 1] = palette, palette[:, None]  # the lower byte of an index is the first pixel
    return pairs.view(np.uint16).reshape(-1)


def _fill(reader: zstandard.ZstdDecompressionReader, buffer: np.ndarray) -> None:
    """Read exactly a buffer, uint8 [bytes]."""
    filled = 0
    while filled < len(buffer):
        count = reader.readinto(buffer.data[filled:])
        if not count:
            raise PlanError("its frame ends early")
        filled += count


def _in_parallel(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """What `work` makes of each item, on as many threads as torch may use; the first error ends it."""
    items = list(items)
    threads = min(torch.get_num_threads(), _THREADS, len(items))
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))
