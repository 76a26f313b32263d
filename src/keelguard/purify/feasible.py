"""What the vaccine's settings ask of a model and its clean data, told before anything is measured or trained.

check_settings(loaded, threat, words, config)
check_chats(material.train, config)
"""

import math
from collections.abc import Sequence

import torch

from keelguard.errors import UsageError
from keelguard.models import LoadedModel
from keelguard.purify.components import ranked
from keelguard.purify.config import PurifyConfig
from keelguard.purify.grouped_lora import adapted_weights
from keelguard.purify.methods import Threat, VaccineConfig, choose_variants, share_of
from keelguard.purify.neutralize import adapter_places, output_bias
from keelguard.purify.restore import split_chats
from keelguard.purify.spikes import make_canaries
from keelguard.records import Chat, assistant, user
from keelguard.units.index import UnitIndex, build_index, parameters_by_name


def uses_vaccine(config: PurifyConfig) -> bool:
    """Whether the method trains variants and neutralises what they have in common."""
    return config.method.method in ("vaccine", "both")


def check_settings(loaded: LoadedModel, threat: Threat, words: Sequence[str], config: PurifyConfig) -> None:
    """Refuse settings of the vaccine that a model cannot be given; other methods have none of these.

    Raises:
        UsageError: there are too few variants, the share takes none or all of a layer, the architecture has no place
            for a mean, or the adapter is of a kind that cannot be zeroed for single units.
    """
    if not uses_vaccine(config):
        return
    method, vaccine = config.method.method, config.method.vaccine
    index = build_index(loaded.model)
    _check_share(index, vaccine, threat)
    if threat == "full":
        adapted_weights(loaded.model)
        if vaccine.how == "mean":
            _check_biases(loaded, index, vaccine)
    else:
        try:
            adapter_places(loaded.model, index, _scored(index, vaccine))
        except UsageError as error:
            raise UsageError(f"--method {method}: {error}, or choose --method immunize or retrain") from error
    _check_variants(loaded, words, config)


def check_chats(chats: Sequence[Chat], config: PurifyConfig) -> None:
    """Refuse clean chats that the vaccine cannot be trained on, or not in the canaries' copy, which has half of them.

    Raises:
        UsageError: a variant would have no chat of its own, or too few are left to restore with.
    """
    if not uses_vaccine(config):
        return
    vaccine, half = config.method.vaccine, len(chats) // 2
    fewest = chats if config.spikes is None else chats[half:]
    if (count := vaccine.variants.count) > len(fewest):
        spiked = "" if config.spikes is None else f", and the canaries' copy {len(fewest)} of them"
        raise UsageError(
            f"--count {count}: the vaccine has {len(chats)} clean chats to train on{spiked}, fewer than one for each "
            f"variant; give --count {len(fewest)} or less, or more rows with --clean-data"
        )
    if vaccine.restore is not None:
        for some in (chats, fewest):
            try:
                split_chats(some, vaccine.restore)
            except UsageError as error:
                raise UsageError(f"--clean-data: {error}") from error


def stand_ins(count: int) -> list[Chat]:
    """As many different chats as there will be at most, where their answers are not known yet."""
    return [(user(f"{number}"), assistant("x")) for number in range(count)]


def _scored(index: UnitIndex, vaccine: VaccineConfig) -> torch.Tensor:
    """The units (units,) bool that a signature scores."""
    mask = torch.zeros(len(index), dtype=torch.bool)
    for block in index.blocks:
        mask[block.span] = block.kind == "mlp" or vaccine.signature.attention
    return mask


def _check_share(index: UnitIndex, vaccine: VaccineConfig, threat: Threat) -> None:
    share = share_of(vaccine, threat)
    scores = torch.where(_scored(index, vaccine), 0.0, math.nan).double()
    layers: dict[int, list[tuple[int, int]]] = {}
    for group in ranked(index, scores):
        size, taken = len(group.units), len(group.chosen(share, lowest=False))
        if taken == size:
            most = math.floor(1e4 * (size - 0.6) / size) / 1e4
            raise UsageError(
                f"--share {share:g}: takes all {size} components of kind {group.kind} in layer {group.layer}, which "
                f"would be lost; give {most:g} or less"
            )
        layers.setdefault(group.layer, []).append((size, taken))
    for layer, groups in layers.items():
        if not any(taken for _, taken in groups):
            size = max(size for size, _ in groups)
            raise UsageError(
                f"--share {share:g}: takes none of the {size} components of layer {layer}; give "
                f"{math.ceil(1e4 * 0.6 / size) / 1e4:g} or more"
            )


def _check_biases(loaded: LoadedModel, index: UnitIndex, vaccine: VaccineConfig) -> None:
    parameters, scored = parameters_by_name(loaded.model), _scored(index, vaccine)
    for block in index.blocks:
        if scored[block.span].any() and not output_bias(block, parameters):
            raise UsageError(
                f"--how mean: {block.output.parameter} has no bias that could hold a mean, and this architecture has "
                "no place for one; choose --how reinit or zero"
            )


def _check_variants(loaded: LoadedModel, words: Sequence[str], config: PurifyConfig) -> None:
    """Choose the variants as the run will, and as its canaries' copy will, where some words are taken."""
    vaccine, left_out = config.method.vaccine, set(config.method.immunize.left_out)
    taken: set[str] = set()
    if config.spikes is not None:
        canaries = make_canaries(words, config.spikes.seed).values()
        taken = {word for canary in canaries for word in canary.words}
    count = vaccine.variants.count
    for banned in (left_out, left_out | taken):
        found = choose_variants(loaded.tokenizer, [w for w in words if w.lower() not in banned], vaccine)
        if len(found) < count:
            source = "default" if vaccine.source == "auto" else vaccine.source
            fewer = f"--count {len(found)} or less, or " if len(found) > 1 else ""
            raise UsageError(
                f"--count {count}: --variants {source} holds {len(found)} of them; give {fewer}--variants with a file "
                f"of {count}"
            )
