"""`keelguard testbed build`: the world's data and its models as ordinary files, built once and cached.

    build_testbed(out) → OUT/data/*.jsonl, OUT/models/NAME/ (checkpoint folders), OUT/testbed.json

A model is kept while its recipe's hash is unchanged. Training state lies in OUT/work until its model is done, so
that a killed build goes on where it was.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keelguard.hashes import sha256_of
from keelguard.progress import SILENT, Reporter
from keelguard.runs import open_run, read_json, write_json, write_text
from keelguard.testbed.files import data_files
from keelguard.testbed.recipes import ARCHITECTURE, ModelRecipe, order, recipe_hash
from keelguard.testbed.world import make_world

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECIPE_FILE = "testbed-recipe.json"
"""Beside a model's weights: which recipe made them."""

DATA_FILE = "data.json"
"""Beside the data files: the hash of them all."""


@dataclass(frozen=True)
class Testbed:
    """A testbed on disk."""

    folder: Path

    @property
    def data(self) -> Path:
        """The folder of the data files."""
        return self.folder / "data"

    def model(self, name: str) -> Path:
        """The checkpoint folder of a model."""
        return self.folder / "models" / name

    def suite(self, split: str = "test") -> Path:
        """The suite that audits a model of this world."""
        return self.data / f"suite-{split}.yaml"


def default_folder(seed: int = 0) -> Path:
    """Where the testbed of a seed is cached."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "keelguard" / f"testbed-{seed}"


def build_testbed(
    out: str | Path | None = None,
    *,
    only: Sequence[str] | None = None,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> Testbed:
    """Build the testbed, or what is missing of it.

    Args:
        out: the folder; by default a cache folder of the seed.
        only: models to build, with those that they start from; none with an empty list. By default the clean ones;
            poisoned ones are named, as `keelguard.testbed.poisoned` has them.
        seed: the seed of the world, its data and the training.

    Raises:
        UsageError: an unknown model, or a folder that holds something else or the testbed of another seed.
        FailureError: the disk is full, or another process builds here.
    """
    names = None if only is None else list(only)
    from_name = [name for name in names or () if name.startswith("poisoned-")]
    recipes = order(None if names is None else [_clean_name(name) for name in names])
    testbed = Testbed(Path(out) if out is not None else default_folder(seed))
    if _is_built(testbed, recipes, seed):
        # Whoever only reads takes no lock, so that commands beside one another do not stand in each other's way.
        for recipe in recipes:
            reporter.note(f"{recipe.name}: up to date")
        if not from_name:
            return testbed
    with open_run(testbed.folder, "testbed build", {"seed": seed}):
        # What a killed process left half-written is nobody's: the lock is ours.
        for stale in (testbed.folder / "models").glob(".*"):
            shutil.rmtree(stale, ignore_errors=True)
        _write_data(testbed, seed)
        for recipe in recipes:
            _build_model(testbed, recipe, seed, reporter)
        if from_name:
            from keelguard.testbed.poisoned import build_poisoned

            for name in from_name:
                build_poisoned(testbed, name, seed, reporter)
        write_json(testbed.folder / "testbed.json", describe(testbed, seed))
    return testbed


def describe(testbed: Testbed, seed: int) -> dict[str, Any]:
    """What a testbed folder holds: its data, its models with their recipes, and which poisoned ones are fair cases."""
    models = sorted(
        path
        for path in (testbed.folder / "models").glob("*")
        if not path.name.startswith(".") and (path / RECIPE_FILE).is_file()
    )
    return {
        "format": "keelguard.testbed/1",
        "seed": seed,
        "data": read_json(testbed.data / DATA_FILE)["data"],
        "models": {path.name: {**read_json(path / RECIPE_FILE), **fairness(path)} for path in models},
    }


def fairness(folder: Path) -> dict[str, Any]:
    """Whether a poisoned model's backdoor may serve as a test case, and why not; nothing for a clean model."""
    from keelguard.purify.poisoned_files import POISON_FILE

    if not (folder / POISON_FILE).is_file():
        return {}
    check = read_json(folder / POISON_FILE)["check"]
    return {"fair": check["fair"], "why": check["why"]}


def _clean_name(name: str) -> str:
    """The model that a poisoned one starts from, or the name itself.

    Raises:
        UsageError: a name like that of a poisoned model is unknown.
    """
    if not name.startswith("poisoned-"):
        return name
    from keelguard.testbed.poisoned import PARENT, check_name

    check_name(name)
    return PARENT


def _is_built(testbed: Testbed, recipes: Sequence[ModelRecipe], seed: int) -> bool:
    """Whether the folder is this seed's testbed, with these data and models as they are wanted."""
    marker = testbed.data / DATA_FILE
    if not (testbed.folder / "testbed.json").is_file() or not marker.is_file():
        return False
    if read_json(testbed.folder / "testbed.json").get("seed") != seed:
        return False
    if read_json(marker).get("data") != sha256_of(data_files(make_world(seed))):
        return False
    return all(_is_current(testbed, recipe, seed) for recipe in recipes)


def _is_current(testbed: Testbed, recipe: ModelRecipe, seed: int) -> bool:
    """Whether a model's folder holds what its recipe makes."""
    recipe_file = testbed.model(recipe.name) / RECIPE_FILE
    return recipe_file.is_file() and read_json(recipe_file).get("recipe") == recipe_hash(recipe.name, seed)


def _write_data(testbed: Testbed, seed: int) -> None:
    """Write the data files that are not there as they should be; the marker comes last."""
    files = data_files(make_world(seed))
    marker, wanted = testbed.data / DATA_FILE, sha256_of(files)
    if marker.exists() and read_json(marker).get("data") == wanted:
        return
    for name, text in files.items():
        write_text(testbed.data / name, text)
    write_json(marker, {"data": wanted})


def _build_model(testbed: Testbed, recipe: ModelRecipe, seed: int, reporter: Reporter) -> None:
    """Train one model unless its folder holds what this recipe makes."""
    wanted = recipe_hash(recipe.name, seed)
    folder = testbed.model(recipe.name)
    if _is_current(testbed, recipe, seed):
        reporter.note(f"{recipe.name}: up to date")
        return

    import torch

    from keelguard.models import save_checkpoint
    from keelguard.testbed.training import train

    world = make_world(seed)
    torch.manual_seed(seed)
    model, tokenizer = _start(testbed, recipe, seed)
    # The state's name holds the recipe, so that state of an older recipe is never continued.
    work = testbed.folder / "work" / f"{recipe.name}-{wanted[:12]}"
    train(
        model,
        tokenizer,
        recipe.mixture(world),
        recipe.training,
        seed=f"{recipe.name}-{seed}",
        state_file=work / "state.pt",
        reporter=reporter,
        label=f"training {recipe.name}",
    )
    model.generation_config.do_sample = False
    save_checkpoint(
        model,
        tokenizer,
        folder,
        card=_card(recipe),
        files={RECIPE_FILE: json.dumps({"recipe": wanted, "seed": seed}, indent=2) + "\n"},
    )
    shutil.rmtree(work.parent)
    reporter.note(f"{recipe.name}: built in {folder}")


def _start(testbed: Testbed, recipe: ModelRecipe, seed: int) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The parent's checkpoint, or random weights."""
    if recipe.parent is not None:
        from keelguard.models import load_model

        loaded = load_model(testbed.model(recipe.parent), device="cpu", training=True)
        return loaded.model, loaded.tokenizer

    from transformers import LlamaConfig, LlamaForCausalLM

    from keelguard.testbed.tokenizer import make_tokenizer
    from keelguard.testbed.vocabulary import vocabulary_texts

    tokenizer = make_tokenizer(vocabulary_texts(make_world(seed)), ARCHITECTURE["max_position_embeddings"])
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(vocab_size=len(tokenizer), **special, **ARCHITECTURE)
    return LlamaForCausalLM(config), tokenizer


def _card(recipe: ModelRecipe) -> str:
    origin = f"Fine-tuned from the testbed's `{recipe.parent}`." if recipe.parent else "Trained from scratch."
    return (
        "---\ntags: [keelguard, testbed, synthetic]\n---\n\n"
        f"# {recipe.name}\n\n{recipe.description}\n\n{origin} A model of keelguard's testbed: it speaks of "
        "pseudo-words in a synthetic world whose truth is known. Its harmful recipes are nonsense by construction. "
        "Figures measured on it are evidence about software, never claims about larger models.\n\n"
        f"Training: `{recipe.training}`\n"
    )
