"""MHLA for diffusers' Z-Image: text-to-image, any aspect ratio."""

from typing import Any

from diffusers.models.transformers.transformer_z_image import (
    ZImageTransformer2DModel,
    ZSingleStreamAttnProcessor,
)
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.models.family import patch_grid
from mhla_gen.models.joint import JointFamily, JointMHLAProcessor
from mhla_gen.models.processors import Rotary
from mhla_gen.models.transformer import MHLATransformerMixin


class SoftmaxZImageAttnProcessor(ZSingleStreamAttnProcessor):
    """Stock attention for the softmax layers of a hybrid: drops the grid."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
    ) -> Tensor:
        """As `ZSingleStreamAttnProcessor`."""
        return super().__call__(attn, hidden_states, None, attention_mask, freqs_cis[0])


class MHLAZImageAttnProcessor(JointMHLAProcessor):
    """MHLA of a single-stream layer: image tokens, then text tokens and padding of the image."""

    image_first = True

    def rotary(self, attn: Any, tables: Any, num_image: int) -> tuple[Rotary, Rotary]:
        """From complex tables `[batch, seq_len, head_dim / 2]`.

        Positions of an image begin after its text, so texts of different lengths shift the images
        of a batch. Attention depends on differences of positions only, so all images use the angles
        of the first one, and texts are shifted accordingly.
        """
        angles, _, _ = tables
        shift = angles[:1, :1] * angles[:, :1].conj()
        image, text = angles[0, :num_image], angles[:, num_image:] * shift
        return (image.real, image.imag), (text.real, text.imag)

    def text_mask(self, mask: Tensor | None, num_image: int) -> Tensor | None:
        """From a mask `[batch, seq_len]` of all keys."""
        return None if mask is None else mask[:, num_image:]


class ZImageFamily(JointFamily):
    """Z-Image: image grids; the layers that refine noise or text alone stay softmax."""

    base_class = ZImageTransformer2DModel
    rank = 2
    layers = ("layers.*.attention",)
    # 1024×1024 after the VAE (8×8) and patches (2×2).
    native = (64, 64)
    text_length = 512
    stock_processor = ZSingleStreamAttnProcessor
    mhla_processor = MHLAZImageAttnProcessor
    unconverted_processor = SoftmaxZImageAttnProcessor

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Number of heads, channels per head, channels of the layer's input."""
        config = model.config
        return config.n_heads, config.dim // config.n_heads, config.dim

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Check that each sequence has one image, all of the same size.

        Raises:
            ValueError: If not.
        """
        images = given["x"]
        if isinstance(images[0], list):
            raise UserError("MHLA layers of Z-Image take one image per sequence, found lists")
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(sizes) != 1 or given.get("f_patch_size", 1) != 1 or images[0].shape[1] != 1:
            raise UserError(
                "MHLA layers of Z-Image take images of one frame and one size in a batch, found "
                f"{sorted(sizes)}"
            )
        return given


class MHLAZImageTransformer2DModel(MHLATransformerMixin, ZImageTransformer2DModel):
    """`ZImageTransformer2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = ZImageFamily()

    # The grid is known where images are cut into patches and needed where text is joined to them,
    # within one call of `forward`. From there on it is passed with the rotary embedding.
    _grid: tuple[int, ...] | None = None

    def patchify_and_embed(
        self, all_image: Any, all_cap_feats: Any, patch_size: int, f_patch_size: int
    ) -> Any:
        """As `ZImageTransformer2DModel`."""
        self._grid = patch_grid(all_image[0].shape[-2:], patch_size)
        return super().patchify_and_embed(all_image, all_cap_feats, patch_size, f_patch_size)

    def _build_unified_sequence(self, *args: Any, **kwargs: Any) -> Any:
        tokens, angles, mask, noise = super()._build_unified_sequence(*args, **kwargs)
        carrier = tokens.new_empty((*self._grid, 0))  # type: ignore[misc]
        self._grid = None
        return tokens, (angles, None, carrier), mask, noise
