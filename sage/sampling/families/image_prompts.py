"""Image prompts (IP-Adapter, Ye et al., 2023): a further condition beside the text."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import sage.torchvision_ops  # noqa: F401

import torch
from torch import Tensor

from sage.errors import ConfigurationError, DataError
from sage.sampling.conditions import Condition
from sage.sampling.pipeline import IMAGE_PROMPTS, SharedSamplingPipeline

# The condition of adapter k is called "image_k".
_CONDITION = "image_"


class ImagePrompted(SharedSamplingPipeline):
    """A pipeline whose prompts may each have an image prompt; a block of prompts has the mean of their embeddings.

    The arguments are those of the stock call, `ip_adapter_image` or `ip_adapter_image_embeds`, with an entry for each
    adapter. As there, an entry is an image or a list of images, for all prompts, or embeddings (g, images, ...), g = 2
    under guidance in which the text is left out, without image before with image. Beyond it, an entry may be a list of
    lists, the images of each prompt, or embeddings (g * prompts, images, ...), the rows without image first.
    """

    # Of the base class; that of a family gets the parameters of its stock call.
    __call__ = SharedSamplingPipeline.__call__

    # Provided by the stock class.
    prepare_ip_adapter_image_embeds: ClassVar[Any]

    def _prepare_call(
        self,
        prompts: list[str] | None,
        negatives: list[str] | None,
        given: dict[str, Any],
        steps: int,
        scale: float,
        options: dict[str, Any],
        batch_size: int = 1,
    ) -> None:
        adapters = self._image_adapters()
        names = [name for name in IMAGE_PROMPTS if name in given]
        if len(names) != min(adapters, 1) and not (self._has_one_adapter and not names):
            raise ConfigurationError(
                f"the call has {' and '.join(names) or 'no image prompt'}, and the network {adapters} image adapters "
                "(load_ip_adapter); give ip_adapter_image or ip_adapter_image_embeds if there is an adapter, else none"
            )
        for name in names:
            count = len(given["prompt_embeds"] if prompts is None else prompts)
            entries = given[name] if isinstance(given[name], (list, tuple)) else [given[name]]
            if len(entries) != adapters:
                raise ConfigurationError(
                    f"{name} has {len(entries)} entries for {adapters} adapters; give one for each"
                )
            each = 2 if self._is_guided(scale, negatives, given) else 1
            columns = [
                _images(entry, count) if name == "ip_adapter_image" else _rows(entry, count, each) for entry in entries
            ]
            given[name] = list(zip(*columns, strict=True))
        super()._prepare_call(prompts, negatives, given, steps, scale, options, batch_size)

    @property
    def _has_one_adapter(self) -> bool:
        """Whether the network is one of SD 3, which has one adapter at most, and does without an image prompt, too."""
        return getattr(self._network, "image_proj", None) is not None

    def _image_adapters(self) -> int:
        if self._has_one_adapter:
            return 1
        if getattr(self._network.config, "encoder_hid_dim_type", None) != "ip_image_proj":
            return 0
        return int(self._network.encoder_hid_proj.num_ip_adapters)

    def _prepared_images(self, name: str, entries: Sequence[Any], guided: bool) -> list[Tensor]:
        """Return the stock pipeline's embeddings (g, images, ...) of a prompt's entries, one for each adapter."""
        prepare = self.prepare_ip_adapter_image_embeds
        given: Any = entries[0] if self._has_one_adapter else list(entries)
        images, embeddings = (given, None) if name == "ip_adapter_image" else (None, given)
        halves = (guided,) if "do_classifier_free_guidance" in inspect.signature(prepare).parameters else ()
        found = prepare(images, embeddings, self._execution_device, 1, *halves)
        found = found if isinstance(found, list) else [found]
        if wrong := [len(rows) for rows in found if len(rows) != (2 if halves and guided else 1)]:
            raise ConfigurationError(
                f"a prompt has {wrong[0] // (2 if guided else 1)} images of one adapter, but {type(self).__name__} "
                "takes one; give one"
            )
        return found

    def _image_conditions(self, given: Mapping[str, Any], guided: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the conditions (n, ...) of the image prompts in `given`, without and with image; {} if there are none.

        Raises ConfigurationError if the prompts have different numbers of images.
        """
        name = next((name for name in IMAGE_PROMPTS if name in given), None)
        if name is None:
            return {}, {}
        known: dict[tuple[int, ...], Sequence[Tensor]] = {}  # one image prompt for all is encoded once
        for entries in given[name]:
            if (key := tuple(map(id, entries))) not in known:
                known[key] = self._prepared_images(name, entries, guided)
        without: dict[str, Tensor] = {}
        with_image: dict[str, Tensor] = {}
        for number, rows in enumerate(zip(*(known[tuple(map(id, entries))] for entries in given[name]), strict=True)):
            if len(sizes := sorted({row.shape[1] for row in rows})) > 1:
                raise ConfigurationError(f"adapter {number} has prompts with {sizes} images; give all the same number")
            both = torch.stack(rows)  # (n, g, images, ...)
            without[f"{_CONDITION}{number}"], with_image[f"{_CONDITION}{number}"] = both[:, 0], both[:, -1]
        return without if guided else {}, with_image


def image_embeddings(condition: Condition, prefix: str = "") -> list[Tensor]:
    """Return the image prompts among conditions, (rows, ...) for each adapter; those without image have a prefix."""
    return [rows for name, rows in condition.items() if name.startswith(prefix + _CONDITION)]


def _images(entry: Any, count: int) -> Sequence[Any]:
    """Return what each of the prompts has of an adapter's entry: an image or a list of images."""
    if not (isinstance(entry, (list, tuple)) and entry and all(isinstance(item, (list, tuple)) for item in entry)):
        return [entry] * count
    if len(entry) != count:
        raise ConfigurationError(
            f"ip_adapter_image has lists of images for {len(entry)} prompts, but there are {count}; give one for each, "
            "or one list of images for all"
        )
    return entry


def _rows(entry: Any, count: int, each: int) -> list[Tensor]:
    """Return the embeddings (each, images, ...) of every prompt, from rows without images and then rows with."""
    if not torch.is_tensor(entry) or entry.ndim not in (3, 4) or len(entry) not in (each, each * count):
        found = tuple(entry.shape) if torch.is_tensor(entry) else type(entry).__name__
        raise ConfigurationError(
            f"ip_adapter_image_embeds has {found} of an adapter; give a tensor (rows, images, ...) with {each} rows "
            f"for all prompts, or {each * count} for {count} prompts, the rows without image first"
        )
    if not entry.isfinite().all():
        raise DataError("ip_adapter_image_embeds holds values that are not finite; leave those out")
    if len(entry) == each:
        return [entry] * count
    return [entry[number::count] for number in range(count)]
