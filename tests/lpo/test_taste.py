"""Vectors from examples: the arithmetic by hand, and that they tell the groups of a known world apart."""

from pathlib import Path

import numpy as np
import pytest

import toy_lists
from palate.corpora.worlds import shapes
from palate.lpo.taste import rank_weights, taste_vectors
from palate.models.image_features import image_features, pixel_statistics


def test_weights_fall_with_the_rank_and_ties_share_theirs() -> None:
    assert rank_weights([0, 1]).tolist() == [1, -1]
    assert rank_weights([0, 1, 2, 3]) == pytest.approx([1, 1 / 3, -1 / 3, -1])
    assert rank_weights([0, 0, 1, 1]) == pytest.approx([2 / 3, 2 / 3, -2 / 3, -2 / 3])


def test_a_vector_is_the_mean_contrast_of_a_persons_lists(tmp_path: Path) -> None:
    rows = [toy_lists.row(number, 3, user_id=f"u{number % 2}", split="validation") for number in range(4)]
    rows += [toy_lists.row(4, 2, user_id="tied", split="validation")]
    rows[-1]["items"][1]["tie_group"] = 0  # says nothing
    rows += [toy_lists.row(5, 3, user_id=None, split="validation"), toy_lists.row(6, 3, user_id="u9", split="test")]
    lists = toy_lists.write(tmp_path, rows)
    found = taste_vectors(lists, "validation", pixel_statistics)
    found_UD = found.vectors_UD
    assert found.ids == ("u0", "u1")
    from palate.corpora.pictures import decode_image, read_images

    images = read_images(lists, {item["image_uid"] for row in rows for item in row["items"]})
    lists_LMD = np.array(
        [pixel_statistics([decode_image(images[item["image_uid"]]) for item in row["items"]]) for row in rows[:4]]
    )
    contrasts_LD = (lists_LMD[:, 0] - lists_LMD[:, 2]) / 2
    spreads_D = np.sqrt(((lists_LMD - lists_LMD.mean(1, keepdims=True)) ** 2).mean((0, 1)))
    expected_UD = np.stack([contrasts_LD[[0, 2]].mean(0), contrasts_LD[[1, 3]].mean(0)]) / spreads_D
    assert found_UD == pytest.approx(expected_UD / np.sqrt((expected_UD**2).mean()))
    # Preferred images are redder: the mean red of a cell, and no other channel.
    assert found_UD[:, 0:48:3].min() > 1
    with pytest.raises(ValueError, match="no ranked list of a person in split 'train'"):
        taste_vectors(lists, "train", pixel_statistics)


def test_people_of_one_group_are_nearer_to_each_other(tmp_path: Path) -> None:
    """Nearest neighbours by cosine, which is what the branch has to tell people apart by."""
    config = shapes.ShapesConfig(out=str(tmp_path), scenes=0, lists=12, tests=1, users=12, variation=0.0)
    world = shapes.prepare(config)
    groups = {one.user_id: one.group for one in shapes.read_annotators(world)}
    found = taste_vectors(world, "examples", pixel_statistics)
    people, vectors_UD = found.ids, found.vectors_UD
    assert len(people) == 12  # held-out people as well
    unit_UD = vectors_UD / np.linalg.norm(vectors_UD, axis=1, keepdims=True)
    cosines_UU = unit_UD @ unit_UD.T - 2 * np.eye(len(people))
    right = [
        groups[people[int(row.argmax())]] == groups[person] for person, row in zip(people, cosines_UU, strict=True)
    ]
    assert np.mean(right) > 0.7  # 0.18 by chance


def test_vision_models_give_features_of_norm_one(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

    side = {"height": 16, "width": 16}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 16, "patch_size": 8}
    clip = CLIPConfig(text_config={**small, "vocab_size": 20}, vision_config=vision, projection_dim=8)
    dino = Dinov2Config(**{**small, "image_size": 16, "patch_size": 8})
    images = [Image.new("RGB", (20, 24), colour) for colour in ("red", "blue", "green")]
    for name, model, width in (("clip", CLIPModel(clip), 8), ("dino", Dinov2Model(dino), 16)):
        model.save_pretrained(tmp_path / name)
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side).save_pretrained(tmp_path / name)
        found = image_features(str(tmp_path / name), batch=2)(images)
        assert found.shape == (3, width)
        assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
        assert found[2] == pytest.approx(image_features(str(tmp_path / name))(images[2:])[0], abs=1e-5)
