"""The prepared operator: a layer's masks by step bucket, called with tensors only."""

from dataclasses import replace

import oracles
import pytest
import torch
from attention_inputs import inputs, masks, permutations
from suite_settings import CPU_CAPABILITIES

import paroattn
from paroattn.block_mask import pack_bits
from paroattn.errors import InputError
from paroattn.ops import prepared, reference
from paroattn.plan import LayerPlan
from paroattn.quantize import Precision

TOKENS, HEADS = 200, 3
MASKS = torch.stack([masks(HEADS, TOKENS, seed=seed) for seed in (1, 2)])  # two step buckets
ORDERS = permutations(HEADS, TOKENS)
LAYER = LayerPlan(
    precisions=(Precision(), Precision("int8", "int8"), Precision("bf16", "exact")),
    orders=ORDERS,
    mask_table=pack_bits(MASKS).flatten(0, 1),
    mask_index=torch.arange(2 * HEADS, dtype=torch.int32).view(2, HEADS),
    compensate=torch.tensor([[True, False, False], [False, True, False]]),
    tokens=TOKENS,
)


@pytest.mark.parametrize("bucket", [0, 1])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_the_bucket_selects_masks_and_compensation(bucket, layout):
    query, key, value = inputs(TOKENS, heads=HEADS, batch=2)
    key_mask = torch.arange(TOKENS).expand(2, -1) < 190
    expected = paroattn.attention(
        query,
        key,
        value,
        permutation=ORDERS,
        block_mask=MASKS[bucket],
        precision=LAYER.precisions,
        compensate=LAYER.compensate[bucket].tolist(),
        key_mask=key_mask,
        scale=0.3,
    )
    op = paroattn.prepare(LAYER, device="cpu", dtype=torch.float32, tensor_layout=layout, scale=0.3)
    if layout == "NHD":
        query, key, value, expected = (x.transpose(1, 2) for x in (query, key, value, expected))
    assert torch.equal(op(query, key, value, bucket=torch.tensor(bucket), key_mask=key_mask), expected)


@pytest.mark.parametrize("backend", ["reference", *(["cpu"] if CPU_CAPABILITIES else [])])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 16), (40, 16), (200, 16), (40, 256), (200, 256)])
def test_a_plan_serves_grouped_heads_and_sequences_under_one_block(tokens, head_dim, backend):
    mask, order = masks(4, tokens), permutations(4, tokens)
    layer = LayerPlan(
        precisions=(Precision(),) * 4,
        orders=order,
        mask_table=pack_bits(mask),
        mask_index=torch.arange(4, dtype=torch.int32).view(1, 4),
        compensate=torch.tensor([[True, False, True, False]]),
        tokens=tokens,
    )
    query, key, value = inputs(tokens, heads=4, key_heads=2, head_dim=head_dim, batch=2)
    op = paroattn.prepare(layer, device="cpu", dtype=torch.float32, backend=backend)
    output = op(query, key, value, bucket=torch.tensor(0))
    expected, _ = oracles.sparse_attention(query, key, value, mask, order, compensate=[True, False, True, False])
    assert oracles.relative_error(output, expected) < 1e-6


def test_a_layer_without_masks_is_dense_at_any_length():
    op = paroattn.prepare(LayerPlan(precisions=(Precision(),) * 2), device="cpu", dtype=torch.float32)
    for tokens in (1, 65):
        tensors = inputs(tokens)  # "HND", both entry points' default
        assert torch.equal(op(*tensors, bucket=torch.tensor(0)), paroattn.attention(*tensors))


def test_what_it_was_not_prepared_for_is_refused():
    op = paroattn.prepare(LAYER, device="cpu", dtype=torch.float32)
    bucket = torch.tensor(0)
    with pytest.raises(ValueError, match="prepared for torch.float32"):
        op(*inputs(TOKENS, heads=HEADS, dtype=torch.float16), bucket=bucket)
    with pytest.raises(ValueError, match="3 heads and 201 tokens; this operator was prepared for 3 heads and 200"):
        op(*inputs(201, heads=HEADS), bucket=bucket)
    with pytest.raises(ValueError, match="2 heads and 200 tokens"):
        op(*inputs(TOKENS, heads=2), bucket=bucket)
    with pytest.raises(ValueError, match="expected 'HND' or 'NHD'"):
        paroattn.prepare(LAYER, device="cpu", dtype=torch.float32, tensor_layout="BHND")
    with pytest.raises(ValueError, match="backend 'magic' is unknown"):
        paroattn.prepare(LAYER, device="cpu", dtype=torch.float32, backend="magic")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_bucket_may_be_any_integer_type(dtype):
    op = paroattn.prepare(LAYER, device="cpu", dtype=torch.float32)
    query, key, value = inputs(TOKENS, heads=HEADS)
    expected = op(query, key, value, bucket=torch.tensor(1))
    assert torch.equal(op(query, key, value, bucket=torch.tensor(1, dtype=dtype)), expected)
    assert not torch.equal(op(query, key, value, bucket=torch.tensor(0, dtype=dtype)), expected)


def test_one_order_serves_all_heads_as_it_does_in_attention():
    op = paroattn.prepare(replace(LAYER, orders=ORDERS[0]), device="cpu", dtype=torch.float32)
    shared = replace(LAYER, orders=ORDERS[:1], order_index=torch.zeros(HEADS, dtype=torch.int32))
    expected = paroattn.prepare(shared, device="cpu", dtype=torch.float32)
    tensors = inputs(TOKENS, heads=HEADS)
    assert torch.equal(op(*tensors, bucket=torch.tensor(0)), expected(*tensors, bucket=torch.tensor(0)))


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_table": LAYER.mask_table[:, :3]},
        {"mask_index": LAYER.mask_index + 1},
        {"mask_index": LAYER.mask_index[:, :2]},
        {"compensate": torch.zeros(2, 2, dtype=torch.bool)},
        {"orders": torch.zeros_like(ORDERS)},
        {"order_index": torch.full((HEADS,), HEADS)},
        {"order_index": torch.zeros(1, dtype=torch.int32)},
    ],
)
def test_parts_that_do_not_fit_are_refused_when_prepared(changes):
    message = {"orders": "permutation"}.get(next(iter(changes)), next(iter(changes)))
    with pytest.raises(ValueError, match=message):
        paroattn.prepare(replace(LAYER, **changes), device="cpu", dtype=torch.float32)


def test_a_mask_with_an_empty_row_is_refused_when_prepared():
    empty = replace(LAYER, mask_table=torch.zeros_like(LAYER.mask_table))
    with pytest.raises(ValueError, match="keeps no block in row 0"):
        paroattn.prepare(empty, device="cpu", dtype=torch.float32)


@pytest.mark.skipif(not CPU_CAPABILITIES, reason="paroattn was installed without a compiler")
def test_a_prepared_layer_is_one_graph_for_all_steps():
    query, key, value = inputs(TOKENS, heads=HEADS)
    op = paroattn.prepare(LAYER, device="cpu", dtype=torch.float32, backend="cpu")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    compiled(query, key, value, bucket=torch.tensor(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for bucket in torch.arange(2):
            assert torch.equal(compiled(query, key, value, bucket=bucket), op(query, key, value, bucket=bucket))


def test_torch_accepts_the_operators():
    query, key, value = inputs(TOKENS, heads=HEADS)
    op = paroattn.prepare(LAYER, device="cpu", dtype=torch.float32, backend="reference")
    torch.library.opcheck(prepared.planned_attention, (query, key, value, torch.tensor(1), None, *op._layer))
    rows = (0, TOKENS, None)
    torch.library.opcheck(prepared.repair_in_place, (query.clone(), query, key, value, None, *rows))


def test_compiled_code_refuses_what_would_need_gradients():
    query, key, value = inputs(TOKENS, heads=HEADS)
    op = paroattn.prepare(LAYER, device="cpu", dtype=torch.float32, backend="reference")
    compiled = torch.compile(op, backend="aot_eager")
    with pytest.raises(InputError, match="value requires grad; paroattn is for inference"):
        compiled(query, key, value.requires_grad_(), bucket=torch.tensor(0))
    with torch.no_grad():
        assert compiled(query, key, value, bucket=torch.tensor(0)).isfinite().all()


def test_a_second_call_of_a_kind_is_repeated_and_another_kind_is_not(monkeypatch):
    repeated, attend = [], reference.attend

    def repeater(inputs):
        def repeat(query, key, value, bucket, key_mask, *tables):
            repeated.append((query.shape[0], int(bucket), [x.shape for x in tables]))
            return None if len(repeated) == 2 else torch.full_like(query, 7)

        return repeat

    monkeypatch.setattr(prepared, "_repeats", {})
    monkeypatch.setattr(reference, "repeater", repeater)
    monkeypatch.setattr(reference, "attend", lambda inputs: attend(inputs.looked_up()))
    layer = replace(LAYER, order_index=torch.arange(HEADS))
    op = paroattn.prepare(layer, device="cpu", dtype=torch.float32, backend="reference")
    tensors, more = inputs(TOKENS, heads=HEADS), inputs(TOKENS, heads=HEADS, batch=2)
    first = op(*tensors, bucket=torch.tensor(0))
    assert (op(*tensors, bucket=torch.tensor(1)) == 7).all()
    assert torch.equal(op(*tensors, bucket=torch.tensor(0)), first)  # what cannot be repeated is done anew
    op(*more, bucket=torch.tensor(0))
    assert (op(*more, bucket=torch.tensor(0)) == 7).all()
    tables = [x.shape for x in (ORDERS, layer.order_index, LAYER.mask_table, LAYER.mask_index, LAYER.compensate)]
    assert repeated == [(1, 1, tables), (1, 0, tables), (2, 0, tables)]


def test_indices_that_are_parts_of_larger_ones_start_where_kernels_expect_them():
    """GPU kernels are compiled for pointers to 16 bytes; a layer's index is a part of all layers'."""
    every = torch.zeros(4, HEADS, dtype=torch.int32), torch.zeros(2, 4, HEADS, dtype=torch.int32)
    assert every[0][1].data_ptr() % 16
    for number in range(4):
        layer = replace(LAYER, order_index=every[0][number], mask_index=every[1][:, number])
        op = paroattn.prepare(layer, device="cpu", dtype=torch.float32)
        assert [x.data_ptr() % 16 for x in op._layer[:4]] == [0] * 4
