"""Principal directions: those of the singular value decomposition, with signs that do not depend on chance."""

import pytest
import torch
from helpers.small import contexts, small_model
from helpers.worlds import WORLDS, exchange_of, tiny_config

from node.exchange.passes import PassSpec
from node.subspace.basis import MomentProbe, digest, group_moments, kept_energy, principal_directions, rank_of
from node.train.basis import weight_moments
from node.train.passes import loss_sum


@pytest.mark.parametrize(
    ("share", "width", "rank"),
    [(0.98, 256, 5), (0.95, 256, 13), (0.98, 2048, 41), (0.95, 2048, 102), (0.99, 8, 1), (0, 8, 8)],
)
def test_the_rank_is_what_the_share_leaves_and_at_least_one(share: float, width: int, rank: int) -> None:
    assert rank_of(share, width) == rank


def test_moments_are_sums_over_all_rows_by_group() -> None:
    z = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    rows = z.reshape(-1, 8)
    torch.testing.assert_close(group_moments(z, 1)[0], rows.T @ rows)
    halves = group_moments(z, 2)
    assert halves.shape == (2, 4, 4)
    for group, part in enumerate(rows.split(4, dim=1)):
        torch.testing.assert_close(halves[group], part.T @ part)


def test_moments_stay_in_float32_under_autocast() -> None:
    """The compute of a pass on a GPU is in bf16: eight bits are too few to sum over tokens."""
    z = torch.randn(400, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(group_moments(z, 2), group_moments(z, 2).float())
        assert group_moments(z, 2).dtype is torch.float32
        found = group_moments(z, 2)
    torch.testing.assert_close(found, group_moments(z, 2), rtol=1e-6, atol=1e-6)


def test_principal_directions_are_the_right_singular_vectors() -> None:
    z = torch.randn(50, 12, dtype=torch.float64) @ torch.diag(torch.linspace(3, 0.3, 12, dtype=torch.float64))
    _, _, right = torch.linalg.svd(z, full_matrices=False)
    found = principal_directions(group_moments(z, 1), 5)[0].double()
    assert found.shape == (12, 5)
    torch.testing.assert_close((right[:5] @ found).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_basis_of_the_weights_is_their_right_singular_vectors() -> None:
    """In Z = XW, by layer, kind and head: the paper's source of the basis."""
    for scope, groups in (("layer", 1), ("head", 2)):
        config = tiny_config(compress={"scope": scope})
        model = small_model(config)
        moments = weight_moments(model)
        assert list(moments) == [(layer, kind) for layer in range(2) for kind in "kv"]
        for (layer, kind), moment in moments.items():
            projection = model.get_parameter(f"layers.{layer}.self_attn.{kind}_proj.weight").detach().double()
            for group, w in enumerate(projection.T.split(16 // groups, dim=1)):  # W [d, D] of each head
                _, _, right = torch.linalg.svd(w, full_matrices=False)
                found = principal_directions(moment, 3)[group].double()
                torch.testing.assert_close((right[:3] @ found).abs(), torch.eye(3).double(), rtol=0, atol=1e-3)


def test_activation_moments_are_those_of_keys_before_rope_and_values() -> None:
    config = tiny_config()
    model = small_model(config)
    seen: dict[str, torch.Tensor] = {}
    for kind in "kv":
        projection = model.get_submodule(f"layers.1.self_attn.{kind}_proj")
        projection.register_forward_hook(lambda _m, _x, z, kind=kind: seen.__setitem__(kind, z.detach()))
    probe = MomentProbe(model.ranks.groups)
    with torch.no_grad():
        exchange = exchange_of(config, WORLDS["1"], 0, None)
        loss_sum(model, exchange, contexts(config), PassSpec(8, False), probe)
    moments = probe.moments
    assert sorted(moments) == [(layer, kind) for layer in range(2) for kind in "kv"]
    for kind, z in seen.items():
        rows = z.reshape(-1, 16)
        torch.testing.assert_close(moments[1, kind][0], rows.T @ rows)


def test_directions_are_orthonormal_strongest_first_with_fixed_signs() -> None:
    rows = torch.randn(2, 40, 10, generator=torch.Generator().manual_seed(3))
    moments = rows.mT @ rows
    found = principal_directions(moments, 10)
    torch.testing.assert_close(found.mT @ found, torch.eye(10).expand(2, 10, 10), rtol=0, atol=1e-6)
    strengths = torch.einsum("gdr,gde,ger->gr", found, moments, found)
    assert (strengths.diff(dim=-1) <= 1e-4).all()
    largest = found.gather(-2, found.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    assert torch.equal(found, principal_directions(moments.clone(), 10))


def test_kept_energy_is_the_share_inside_the_basis() -> None:
    moments = torch.diag(torch.tensor([6.0, 3.0, 1.0]))[None]
    assert kept_energy(moments, torch.eye(3)[None, :, :1]) == pytest.approx(0.6)
    assert kept_energy(moments, torch.eye(3)[None, :, :2]) == pytest.approx(0.9)
    assert kept_energy(moments, torch.eye(3)[None]) == pytest.approx(1.0)
    assert kept_energy(torch.zeros(1, 3, 3), torch.eye(3)[None]) == 0.0  # not a division by zero


def test_a_digest_tells_one_bit() -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    other = one.clone()
    other.view(torch.int32)[1, 1] ^= 1
    assert digest([one]) == digest([one.clone()]) == digest(one.clone().T.contiguous().T.unbind())
    assert digest([one]) != digest([other])
    assert digest([one.bfloat16()]) != digest([one])
