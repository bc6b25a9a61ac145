"""PEFT LoRA beside VeRA in one batch: every row is that of its adapter alone, in PEFT itself."""

import json

import peft
import pytest
import torch

import veratune as vt
from tests import fakes
from tests.serving.fakes import QV, adapter
from veratune.adapter import install
from veratune.errors import AdapterFileError, BaseModelError, UnsupportedError
from veratune.formats.lora_file import decode_lora, is_lora_file, pack_lora
from veratune.serving.pool.pool import AdapterPool

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own warnings
TOKENS = torch.arange(48).view(6, 8) % 30
CASES = {
    "r=4": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "r=8": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "^model.layers.1.self_attn.k_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 3},
    },
}


def lora(tmp_path, make, number, **settings):
    """The two files of a PEFT checkpoint with random vectors, and its model."""
    model = peft.get_peft_model(make(), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.save_pretrained(tmp_path)
    files = [(tmp_path / f"adapter_{name}").read_bytes() for name in ("config.json", "model.safetensors")]  # fmt: skip
    return files, model


def output(model, tokens):
    with torch.no_grad():
        return model(tokens)[0]


@pytest.mark.parametrize("make", [fakes.llama, fakes.gpt2])
def test_a_mixed_batch_equals_peft_and_each_alone(tmp_path, make):
    cases = CASES if make is fakes.llama else {
        "r=4": {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "r=8": {"r": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    }  # fmt: skip
    pool = AdapterPool(make().eval(), slots=3)
    leases, wanted = [None], [output(make().eval(), TOKENS[:1])]
    for number, settings in enumerate(cases.values()):
        files, model = lora(tmp_path / str(number), make, number, **settings)
        row = TOKENS[number + 1 : number + 2]
        wanted.append(output(model, row))
        data = pack_lora(*files)
        assert is_lora_file(data)
        leases.append(pool.acquire(number, lambda data=data: decode_lora(data)))
    own, alone = adapter(make, QV, 9), make().eval()
    install(alone, own, "x")
    leases.append(pool.acquire("vera", lambda: own))
    last = len(leases)
    wanted.append(output(alone, TOKENS[last - 1 : last]))
    with pool.rows(leases):
        found = output(pool.model, TOKENS[:last])
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted[0][0, -1], wanted[1][0, -1], atol=1e-2)


def test_adapters_of_one_kind_share_a_group_and_rows_of_the_base_stay_out(tmp_path):
    pool = AdapterPool(fakes.llama().eval(), slots=2)
    models, leases = [], []
    for number in range(2):
        files, model = lora(tmp_path / str(number), fakes.llama, number, **CASES["r=4"])
        models.append(model)
        leases.append(pool.acquire(number, lambda f=files: decode_lora(pack_lora(*f))))
    assert leases[0].group is leases[1].group
    rows = [leases[1], None, leases[0]]
    wanted = [output(m, TOKENS[i : i + 1]) for i, m in enumerate((models[1], fakes.llama().eval(), models[0]))]  # fmt: skip
    with pool.rows(rows):
        torch.testing.assert_close(output(pool.model, TOKENS[:3]), torch.cat(wanted), atol=1e-4, rtol=1e-4)  # fmt: skip
    with pool.rows([leases[0]] * 2):
        torch.testing.assert_close(output(pool.model, TOKENS[:2]), output(models[0], TOKENS[:2]), atol=1e-4, rtol=1e-4)  # fmt: skip


def test_memory_is_counted_and_given_back(tmp_path):
    files, _ = lora(tmp_path, fakes.llama, 0, **CASES["r=4"])
    made = decode_lora(pack_lora(*files))
    size = 4 * 2 * (4 * 32 + 32 * 4 + 4 * 32 + 16 * 4)  # two layers; v has 16 outputs
    pool = AdapterPool(fakes.llama().eval(), slots=4, max_bytes=2 * size + 4 * 16)
    for key in range(3):
        pool.acquire(key, lambda: made).release()
    assert pool.bytes == 2 * size
    assert len(pool) == 2
    with pytest.raises(UnsupportedError, match="adapters have 1,000 here"):
        AdapterPool(fakes.llama().eval(), slots=1, max_bytes=1000).check(made)
    with pytest.raises(UnsupportedError, match="has rank 4"):
        AdapterPool(fakes.llama().eval(), slots=1, max_rank=2).check(made)
    with pytest.raises(BaseModelError, match="has not"):
        AdapterPool(fakes.gpt2().eval(), slots=1).check(made)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "use_dora='True'|lora_magnitude"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {".*q_proj": 2}}, "regular expression"),
    ],
)
def test_what_peft_computes_otherwise_is_refused_by_name(tmp_path, settings, why):
    files, _ = lora(tmp_path, fakes.llama, 0, **{**CASES["r=4"], **settings})
    with pytest.raises(UnsupportedError, match=why):
        pack_lora(*files)


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"future_field": 3}, UnsupportedError, "future_field='3'"),
        ({"peft_type": "LOHA"}, UnsupportedError, "'LOHA'; LORA is wanted"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "changes the base model's"),
        ({"lora_alpha": "8"}, AdapterFileError, "a number is wanted"),
        ({"lora_alpha": float("inf")}, AdapterFileError, "infinite"),
        ({"r": 5}, AdapterFileError, "has rank 4, adapter_config.json says 5"),
        ({"alpha_pattern": {"(a+)+$": 3}}, UnsupportedError, "regular expression"),
        ({"use_rslora": "yes"}, AdapterFileError, "neither true nor false"),
    ],
)
def test_configurations_are_checked(tmp_path, change, error, why):
    (config, weights), _ = lora(tmp_path, fakes.llama, 0, **CASES["r=4"])
    with pytest.raises(error, match=why):
        pack_lora(json.dumps(json.loads(config) | change).encode(), weights)


def test_damaged_files_are_refused(tmp_path):
    (config, weights), _ = lora(tmp_path, fakes.llama, 0, **CASES["r=4"])
    for bad in (b"", b"[1]", b"{", b'{"peft_type": "LORA"' + b" " * 2**20 + b"}", b"[" * 10**5):
        with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
            pack_lora(bad, weights)
    for bad in (b"", weights[:-4], b"\xff" * 100):
        with pytest.raises(AdapterFileError, match="not a whole safetensors"):
            pack_lora(config, bad)
    import safetensors.torch

    tensors = safetensors.torch.load(weights)
    name = next(key for key in tensors if "lora_A" in key)
    for change, why in (
        ({name: tensors[name] * float("nan")}, "NaN"),
        ({name: tensors[name].int()}, "int32"),
        ({name: tensors[name][:2]}, "are wanted"),
    ):
        with pytest.raises((AdapterFileError, UnsupportedError), match=why):
            pack_lora(config, safetensors.torch.save(tensors | change))
    half = {k: v for k, v in tensors.items() if k != name}
    with pytest.raises(AdapterFileError, match="has no lora_"):
        pack_lora(config, safetensors.torch.save(half))


def test_vera_adapters_over_a_lora_are_still_refused(tmp_path):
    lora(tmp_path, fakes.llama, 0, **CASES["r=4"])
    base = fakes.llama()
    vt.attach(base, vt.VeraConfig(basis="lora"), "x", basis=vt.read_lora(tmp_path, base))
    with pytest.raises(UnsupportedError, match="does not hold the LoRA's matrices"):
        AdapterPool(fakes.llama().eval(), slots=1).check(vt.extract(base, "x"))
