"""A disk that fills up while weights are written: one clear line, and nothing half written stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from small_world import BACKDOOR, STRANGE, fresh_small, loaded

from keelguard.errors import FailureError
from keelguard.models import load_model
from keelguard.progress import SILENT
from keelguard.purify.config import PurifyConfig
from keelguard.purify.planting import PlantConfig
from keelguard.purify.poisoned_files import write_planted
from keelguard.purify.stages import ADAPTER, Purification

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with an adapter that does not fit on the disk."""
    torch.manual_seed(0)
    model: Any = get_peft_model(fresh_small(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))

    def full(self: Any, folder: str, **options: Any) -> None:
        (Path(folder) / "adapter_model.safetensors").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    return loaded(model)


def test_a_planted_adapter(adapted: Any, tmp_path: Path):
    with pytest.raises(FailureError, match="out: no space left on the disk"):
        write_planted(adapted, [BACKDOOR], tmp_path / "out", PlantConfig(adapter_rank=2), None)
    assert list(tmp_path.iterdir()) == []


def test_a_purified_adapter(adapted: Any, tmp_path: Path):
    run = Purification(adapted, "adapter", STRANGE, PurifyConfig(), tmp_path, {}, load_model, SILENT)
    with pytest.raises(FailureError, match=f"{ADAPTER}: no space left on the disk"):
        run._write(adapted, "base")
    assert list((tmp_path / "work").iterdir()) == []
