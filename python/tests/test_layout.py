"""Moves random KV between page layouts and back, through packed chunks."""

from __future__ import annotations

import mmap

import pytest
import torch

from pd_sidecar.kv.copier import Piece
from pd_sidecar.kv.host_copy import HostCopier
from pd_sidecar.kv.layout import (
    Hint,
    LayoutError,
    chunk_span,
    chunks_of,
    geometry,
    wanted_chunks,
)

LAYERS, HEADS, SIZE, CHUNK = 3, 2, 16, 64


def one_backing(shape, dtype, order=None):
    """Puts all layers into one storage, as vLLM 0.32 allocates them."""
    return list(separate((LAYERS, *shape), dtype, None if order is None else order, count=1)[0])


def separate(shape, dtype, order=None, count=LAYERS):
    """Puts each layer into its own storage; `order` is the physical order of the dimensions."""
    out = []
    for _ in range(count):
        order_ = order or tuple(range(len(shape)))
        physical = torch.randn([shape[d] for d in order_]).to(dtype)
        out.append(physical.permute([order_.index(d) for d in range(len(shape))]))
    return out


def tokens_of(tensor, table, block_tokens, count, hint):
    """Reads KV one token at a time: `[planes, tokens, heads * size]`."""
    out = []
    for position in range(count):
        block, offset = table[position // block_tokens], position % block_tokens
        if hint.mla:
            page = tensor[block] if tensor.dim() == 3 else tensor[block][0]
            out.append(page[offset].unsqueeze(0))
        elif tensor.dim() == 4:
            out.append(tensor[block, :, offset].view(HEADS, 2, SIZE).transpose(0, 1).reshape(2, -1))
        else:
            page = tensor[:, block] if tensor.shape[0] == 2 else tensor[block]
            page = page.transpose(1, 2) if page.shape[1] == HEADS else page
            out.append(page[:, offset].reshape(2, -1))
    return torch.stack(out, 1)


BLOCKS = 40
CASES = {
    # For each case, the function that makes tensors with blocks of n tokens.
    "0.32 HND": lambda n, dt: one_backing((BLOCKS, HEADS, n, 2 * SIZE), dt),
    "0.32 NHD": lambda n, dt: one_backing((BLOCKS, HEADS, n, 2 * SIZE), dt, (0, 1, 3, 2, 4)),
    "0.32 BLHNC": lambda n, dt: one_backing((BLOCKS, HEADS, n, 2 * SIZE), dt, (1, 0, 2, 3, 4)),
    "0.28 packed": lambda n, dt: separate((BLOCKS, HEADS, n, 2 * SIZE), dt),
    "0.24 NHD": lambda n, dt: separate((BLOCKS, 2, n, HEADS, SIZE), dt),
    "0.24 HND": lambda n, dt: separate((BLOCKS, 2, n, HEADS, SIZE), dt, (0, 1, 3, 2, 4)),
    "0.20 NHD": lambda n, dt: separate((2, BLOCKS, n, HEADS, SIZE), dt),
    "0.20 CPU": lambda n, dt: separate((2, BLOCKS, HEADS, n, SIZE), dt),
    "MLA 0.32": lambda n, dt: one_backing((BLOCKS, 1, n, 36), dt),
    "MLA 0.28": lambda n, dt: separate((BLOCKS, n, 36), dt),
}


class Side:
    """One engine's tensors with their copier."""

    def __init__(self, case, block_tokens, buffer, dtype, kernel_tokens=None, writer=None):
        self.hint = Hint(
            num_blocks=BLOCKS * (kernel_tokens or block_tokens) // block_tokens,
            block_tokens=block_tokens,
            kv_heads=HEADS,
            head_size=SIZE,
            mla=case.startswith("MLA"),
        )
        tensors = CASES[case](kernel_tokens or block_tokens, dtype)
        self.tensors = {f"model.layers.{i}.attn": tensor for i, tensor in enumerate(tensors)}
        writers = dict.fromkeys(self.tensors, writer) if writer else None
        self.pages = geometry(self.tensors, self.hint, writers)
        self.slot_bytes = self.pages.token_bytes * CHUNK
        self.copier = HostCopier(self.pages, buffer, self.slot_bytes)
        self.table = torch.randperm(self.hint.num_blocks)

    def read(self, count):
        kernel = self.pages.first.tokens
        ratio = self.hint.block_tokens // kernel
        table = [int(b) * ratio + i for b in self.table for i in range(ratio)]
        return torch.stack([tokens_of(t, table, kernel, count, self.hint) for t in self.tensors.values()], 1)


def bits(tensor):
    """Returns the bytes of a tensor, because torch cannot compare every dtype."""
    return tensor.contiguous().view(torch.uint8)


def pieces(side, tokens, first_token, have, slots):
    out = []
    for chunk in wanted_chunks(tokens, have, CHUNK):
        packed = chunk_span(chunk, tokens, first_token, CHUNK)
        moved = (max(packed[0], have), packed[1])
        out.append(Piece(slots[chunk], side.table, packed, moved))
    return out


def memory():
    return mmap.mmap(-1, 12 * CHUNK * LAYERS * 2 * HEADS * SIZE * 4)


@pytest.mark.parametrize(
    ("source", "target"),
    [(a, b) for a in CASES for b in CASES if a.startswith("MLA") == b.startswith("MLA")],
)
def test_kv_survives_the_way_between_any_two_layouts(source, target):
    check_way(source, target, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_kv_survives_in_any_dtype(dtype):
    check_way("0.32 HND", "0.24 NHD", dtype)


def check_way(source, target, dtype):
    torch.manual_seed(1)
    buffer = memory()
    prefill, decode = Side(source, 16, buffer, dtype), Side(target, 32, buffer, dtype)
    tokens, slots = 3 * CHUNK + 17, [5, 6, 2, 9]
    before = decode.read(tokens)
    prefill.copier.gather(pieces(prefill, tokens, 0, 0, slots))
    decode.copier.scatter(pieces(decode, tokens, 0, 0, slots))
    assert torch.equal(bits(prefill.read(tokens)), bits(decode.read(tokens)))
    assert not torch.equal(bits(before), bits(decode.read(tokens)))


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [3, 0, 7, 5]])
def test_the_chunk_with_the_mark_begins_there(slots):
    buffer = memory()
    prefill = Side("0.32 HND", 32, buffer, torch.float32)
    decode = Side("0.24 NHD", 16, buffer, torch.float32)
    tokens, have = 3 * CHUNK + 9, CHUNK + 48
    before = decode.read(tokens).clone()
    prefill.copier.gather(pieces(prefill, tokens, have, have, slots))
    decode.copier.scatter(pieces(decode, tokens, have, have, slots))
    after = decode.read(tokens)
    assert torch.equal(after[:, :, :have], before[:, :, :have])
    assert torch.equal(after[:, :, have:], prefill.read(tokens)[:, :, have:])


def test_nothing_below_the_local_prefix_is_written_even_if_the_chunk_holds_it():
    buffer = memory()
    prefill = Side("0.32 NHD", 32, buffer, torch.float32)
    decode = Side("0.32 HND", 16, buffer, torch.float32)
    tokens, have, slots = CHUNK + 30, 16, [1, 4]
    before = decode.read(tokens).clone()
    prefill.copier.gather(pieces(prefill, tokens, 0, 0, slots))
    decode.copier.scatter(pieces(decode, tokens, 0, have, slots))
    after = decode.read(tokens)
    assert torch.equal(after[:, :, :have], before[:, :, :have])
    assert torch.equal(after[:, :, have:], prefill.read(tokens)[:, :, have:])


def test_blocks_of_the_table_may_be_several_of_the_tensor():
    buffer = memory()
    prefill = Side("0.32 HND", 64, buffer, torch.float32, kernel_tokens=16)
    decode = Side("0.24 NHD", 16, buffer, torch.float32)
    tokens, slots = 2 * CHUNK + 3, [0, 1, 2]
    prefill.copier.gather(pieces(prefill, tokens, 0, 0, slots))
    decode.copier.scatter(pieces(decode, tokens, 0, 0, slots))
    assert torch.equal(prefill.read(tokens), decode.read(tokens))


def test_a_chunk_is_lmcaches_format():
    buffer = memory()
    side = Side("0.32 HND", 32, buffer, torch.float32)
    tokens, count = CHUNK + 10, 2 * LAYERS * HEADS * SIZE
    side.copier.gather(pieces(side, tokens, 0, 0, [3, 1]))
    data = torch.frombuffer(buffer, dtype=torch.float32)
    expect = side.read(tokens)
    for slot, (start, stop) in ((3, (0, CHUNK)), (1, (CHUNK, tokens))):
        at = slot * side.slot_bytes // 4
        chunk = data[at : at + count * (stop - start)].view(2, LAYERS, stop - start, -1)
        assert torch.equal(chunk, expect[:, :, start:stop])


@pytest.mark.parametrize(
    ("tensors", "mla"),
    [
        ({"a": torch.zeros(8, 3, 16, 32)}, False),
        ({"a": torch.zeros(8, 2, 16, 31)}, False),
        ({"a": torch.zeros(8, 2, 16, 32).transpose(2, 3)}, False),
        ({"a": torch.zeros(8, 16)}, True),
        ({"a": torch.zeros(8, 2, 16, 32), "b": torch.zeros(8, 2, 8, 32)}, False),
        ({"a": torch.zeros(8, 2, 12, 32)}, False),
        ({"a": torch.zeros(8, 2, 16, 32, dtype=torch.complex64)}, False),
        ({"a": torch.zeros(8, 2, 16, 32, device="meta")}, False),
        ({}, False),
    ],
)
def test_what_cannot_be_moved_is_refused(tensors, mla):
    with pytest.raises(LayoutError):
        geometry(tensors, Hint(8, 16, 2, 16, mla))


def test_layers_are_ordered_by_number_and_shared_ones_count_once():
    tensors = {f"model.layers.{i}.attn": torch.zeros(8, 2, 16, 32) for i in (10, 2, 1)}
    tensors["model.layers.11.attn"] = tensors["model.layers.2.attn"]
    pages = geometry(tensors, Hint(8, 16, 2, 16, False))
    names = ("model.layers.1.attn", "model.layers.2.attn", "model.layers.10.attn")
    assert [p.tensor.data_ptr() for p in pages.layers] == [tensors[n].data_ptr() for n in names]


def test_a_table_that_is_too_short_or_wrong_is_refused():
    side = Side("0.32 HND", 32, memory(), torch.float32)
    for table in (torch.tensor([1]), torch.tensor([1, BLOCKS])):
        with pytest.raises(LayoutError):
            side.copier.gather([Piece(0, table, (0, 40), (0, 40))])


@pytest.mark.parametrize(
    ("index", "tokens", "first", "span"),
    [
        (0, 300, 0, (0, 256)),
        (1, 300, 0, (256, 300)),
        (1, 300, 288, (288, 300)),
        (0, 300, 288, (256, 256)),
        (0, 1, 0, (0, 1)),
    ],
)
def test_chunk_span(index, tokens, first, span):
    assert chunk_span(index, tokens, first, 256) == span


@pytest.mark.parametrize(
    ("tokens", "have", "chunks"),
    [(300, 0, [0, 1]), (300, 256, [1]), (300, 255, [0, 1]), (300, 300, []), (256, 0, [0])],
)
def test_wanted_chunks(tokens, have, chunks):
    assert list(wanted_chunks(tokens, have, 256)) == chunks
    assert chunks_of(tokens, 256) == -(-tokens // 256)


# Pages in which the order of the elements differs from the shape.


def columns(key, value, cache, slots):
    """Stores in the order of vLLM's CPU kernels: V follows K in a page, and K is column by column."""
    pages = cache.view(cache.shape[0], HEADS, 2, -1)
    for k, v, slot in zip(key, value, slots.tolist(), strict=True):
        block, token = divmod(slot, cache.shape[2])
        pages[block, :, 0].view(HEADS, SIZE, -1)[:, :, token] = k
        pages[block, :, 1].view(HEADS, -1, SIZE)[:, token] = v


def tiles(key, value, cache, slots):
    """Stores in the order of vLLM's CPU kernels with AMX: K in pairs of dimensions, V in pairs of tokens."""
    pages = cache.view(cache.shape[0], HEADS, 2, -1)
    for k, v, slot in zip(key, value, slots.tolist(), strict=True):
        block, token = divmod(slot, cache.shape[2])
        k_tiles = pages[block, :, 0].view(HEADS, -1, SIZE // 2, 16, 2)
        k_tiles[:, token // 16, :, token % 16] = k.view(HEADS, SIZE // 2, 2)
        v_tiles = pages[block, :, 1].view(HEADS, SIZE // 16, -1, 16, 2)
        v_tiles[:, :, token // 2, :, token % 2] = v.view(HEADS, SIZE // 16, 16)


def plain(key, value, cache, slots):
    """Stores in the order of the tensor's shape."""
    for k, v, slot in zip(key, value, slots.tolist(), strict=True):
        block, token = divmod(slot, cache.shape[2])
        cache[block, :, token] = torch.cat([k, v], 1)


def stored(writer, side, values):
    """Fills the side's tensors with the side's writer; `values` is `[2, layers, tokens, heads * size]`."""
    kernel = side.pages.first.tokens
    count = values.shape[2]
    slots = torch.tensor([int(side.table[p // kernel]) * kernel + p % kernel for p in range(count)])
    for layer, tensor in enumerate(side.tensors.values()):
        key, value = values[:, layer].view(2, count, HEADS, SIZE)
        writer(key, value, tensor, slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("writer", [plain, columns, tiles], ids=lambda w: w.__name__)
def test_the_kernel_says_where_kv_is(writer, dtype):
    buffer = memory()
    prefill = Side("0.32 HND", 32, buffer, dtype, writer=writer)
    decode = Side("0.32 HND", 64, buffer, dtype, writer=writer)
    reader = Side("0.24 NHD", 16, buffer, dtype)
    tokens, have, slots = 3 * CHUNK + 20, 64, [1, 2, 3, 6]
    values = torch.randn(2, LAYERS, tokens, HEADS * SIZE).to(dtype)
    stored(writer, prefill, values)
    stored(writer, decode, torch.zeros_like(values))
    prefill.copier.gather(pieces(prefill, tokens, 0, 0, slots))
    reader.copier.scatter(pieces(reader, tokens, 0, 0, slots))
    assert torch.equal(reader.read(tokens), values)
    # Then move the chunks into pages of another size, after a local prefix.
    decode.copier.scatter(pieces(decode, tokens, 0, have, slots))
    decode.copier.gather(pieces(decode, tokens, 0, 0, slots))
    reader.copier.scatter(pieces(reader, tokens, 0, 0, slots))
    values[:, :, :have] = 0
    assert torch.equal(reader.read(tokens), values)


def test_a_kernel_that_agrees_with_the_shape_changes_nothing():
    shape_alone = Side("0.32 HND", 32, memory(), torch.float32)
    asked = Side("0.32 HND", 32, memory(), torch.float32, writer=plain)
    assert torch.equal(shape_alone.pages.first.inside, asked.pages.first.inside)


def lossy(key, value, cache, slots):
    plain(torch.sin(key), value, cache, slots)


def wrong_block(key, value, cache, slots):
    plain(key, value, cache, slots - cache.shape[2])


def unwilling(*_):
    raise RuntimeError("unsupported")


@pytest.mark.parametrize("writer", [lossy, wrong_block, unwilling, lambda *_: None])
def test_a_kernel_that_stores_something_else_is_refused(writer):
    with pytest.raises(LayoutError, match=r"layers\.0"):
        Side("0.32 HND", 32, memory(), torch.float32, writer=writer)


@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_vllms_own_cpu_kernel(isa):
    platform = pytest.importorskip("vllm.platforms").current_platform
    if not platform.is_cpu():
        pytest.skip("a vLLM for another platform")
    from vllm import _custom_ops as ops

    platform.import_kernels()

    def writer(key, value, cache, slots):
        pages = cache.view(cache.shape[0], cache.shape[1], 2 * cache.shape[2], -1)
        ops.cpu_attn_reshape_and_cache(key, value, *pages.chunk(2, dim=2), slots, isa)

    shape = (BLOCKS, HEADS, 32, 2 * 32)
    tensors = {"layers.0": torch.zeros(shape)}
    pages = geometry(tensors, Hint(BLOCKS, 32, HEADS, 32, False), {"layers.0": writer})
    inside = pages.first.inside
    assert inside[0, 1, 0] - inside[0, 0, 0] == 1  # K: the next element is the next token
    assert inside[0, 0, 1] - inside[0, 0, 0] == 32
    assert inside[1, 0, 1] - inside[1, 0, 0] == 1  # V: the next element is the next dimension
