"""The report of ``python -m lasp doctor``: text and JSON, known faults, a machine without a GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import lasp.doctor
from lasp.__main__ import main
from lasp.doctor import GUIDE, known, machine
from tests.test_documents import ROOT

SECTIONS = [
    *("machine", "gpus", "links", "variables", "lightning_attention and experts"),
    *("ring_attention", "exchange", "known_faults", "self_check", "guide"),
]


@pytest.fixture
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "")  # no nvidia-smi


def test_json_of_a_machine_without_a_gpu(without_gpus, monkeypatch, capsys) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    for name in ("HF_TOKEN", "NVIDIA_API_KEY", "TORCH_HUB_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    assert main(["doctor", "--json", "--links"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert list(report) == SECTIONS
    assert report["gpus"] == report["links"] == []
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["driver"] == "no nvidia-smi"
    assert report["variables"]["NCCL_DEBUG"] == "INFO"
    assert "secret" not in printed
    row = report["ring_attention"]["cpu float32"]
    assert row["block"] == "cpu_flash"
    assert row["fa4"] == "needs tensors on an NVIDIA GPU"
    row = report["lightning_attention and experts"]["cpu float64"]
    assert row["impl"] == "eager"
    assert "its kernels take bf16, fp16 and fp32" in row["triton"]
    assert set(report["self_check"]) == {
        "lightning_attention",
        "ring_attention",
        "ExpertParallelMoE",
    }


def test_text_has_every_section_and_the_guide(without_gpus, capsys) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for title in SECTIONS[:-1]:
        assert f"{title.replace('_', ' ')}\n" in printed
    assert f"The operators agree with their oracles. Symptoms and remedies: {GUIDE}" in printed
    assert (ROOT / GUIDE).exists()


def test_a_wrong_operator_is_told_and_is_status_1(monkeypatch, capsys) -> None:
    monkeypatch.setattr(lasp.doctor, "self_check", lambda: {"ring_attention": 0.5})
    assert main([]) == 1
    assert "The operators DIFFER FROM their oracles" in capsys.readouterr().out


def test_what_fails_is_told_beside_all_else(monkeypatch, capsys) -> None:
    def fails() -> None:
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(lasp.doctor, "impl_rules", fails)
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert "failed                         ImportError: libtriton.so: undefined symbol" in printed
    assert "The operators agree with their oracles, but a section above failed." in printed
    monkeypatch.setattr(lasp.doctor, "self_check", fails)
    assert main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert list(report) == SECTIONS
    assert report["self_check"] == {"failed": "ImportError: libtriton.so: undefined symbol"}
    assert main([]) == 1
    assert "The operators could not be compared with their oracles." in capsys.readouterr().out


def test_a_package_without_its_metadata_is_told(monkeypatch, tmp_path, capsys) -> None:
    (tmp_path / "megatron_core-0.16.1.dist-info").mkdir()  # what an interrupted pip leaves
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)["machine"]["megatron-core"]
    assert found == "broken, without metadata: reinstall it"


@pytest.mark.parametrize(
    ("package", "version", "symptom"),
    [
        ("torch", "2.11.0+cu130", "connectFullMesh"),
        ("torch", "2.13.0", "in bfloat16"),
        ("torch", "2.14.0", None),
        ("triton", "3.6.0", "shared memory"),
        ("triton", "3.7.0", None),
        ("megatron-core", "0.15.3", "fails at import"),
        ("megatron-core", "0.16.1", "HybridModel cannot be built"),
        ("megatron-core", "0.19.2", "moments are wrong"),
        ("megatron-core", "0.21.0rc1", "fails at import"),
        ("flash-attn-4", "4.0.0b40", "refuses"),
        ("flash-attn-4", "4.0.0b36", None),
        ("triton", "not installed", None),
    ],
)
def test_known_faults(package: str, version: str, symptom: str | None) -> None:
    found = " ".join(fault.symptom for fault in known.known_faults({package: version}))
    assert symptom in found if symptom else not found


def test_a_known_fault_is_printed_with_its_remedy(monkeypatch, capsys) -> None:
    real = machine.version
    found = {"megatron-core": "0.19.2"}
    monkeypatch.setattr(machine, "version", lambda name: found.get(name) or real(name))
    main([])
    printed = capsys.readouterr().out
    assert "remedy: save without overlap_grad_reduce" in printed


def test_packages_of_others_with_our_names_are_told(monkeypatch) -> None:
    monkeypatch.setattr(machine, "ring", SimpleNamespace(__file__="/elsewhere/ring/__init__.py"))
    found = machine.versions()["imported from"]
    assert "/elsewhere" in found
    assert "other packages have the names ring or lasp, uninstall them" in found


@pytest.mark.gpu
def test_gpus_are_described() -> None:
    assert len(machine.gpus()) == torch.cuda.device_count()
    assert machine.versions()["NCCL"].count(".") == 2


@pytest.mark.multi_gpu
def test_links_are_measured() -> None:
    rows = machine.links(measure=True)
    count = torch.cuda.device_count()
    assert len(rows) == count * (count - 1)
    assert all(float(row["copies"].split()[0]) > 1 for row in rows)
