"""Style embeddings of people, and their clusters (CARD, section 2.3).

The default embedding is stylometric: character n-grams and surface habits, on which topic weighs little. A frozen
hub encoder, mean-pooled, is the alternative (``palate.models.encoders``).
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

# Function words carry style and hardly any topic (Mosteller and Wallace 1964); common English ones.
# fmt: off
FUNCTION_WORDS = (
    "the", "a", "an", "and", "or", "but", "if", "of", "to", "in", "on", "at", "by", "for", "from", "with", "as", "is",
    "are", "was", "were", "be", "been", "it", "this", "that", "these", "those", "not", "no", "i", "you", "he", "she",
    "we", "they", "my", "your", "our", "their", "so", "well", "just", "very", "really", "also", "too", "then", "there",
    "here", "what", "which", "who", "when",
)
# fmt: on
MARKS = (".", ",", "!", "?", ":", ";", "-", "(", "'", '"', "…", "...")
ENDINGS = (".", "!", "?", "...")
# The same habit in another script counts as the same: full-width and ideographic marks, Arabic and Devanagari ones.
SAME_MARKS = str.maketrans("。．！？，、；：（－،؟؛।", "..!?,,;:(-,?;.")
OUTLIER = 3.0  # standard deviations
STABLE = 0.5  # the least mean adjusted Rand index of clusters that count as found

SILHOUETTE_PEOPLE = 5000

STYLE_MAP = "style_map.safetensors"
CENTROIDS = "centroids.safetensors"


@dataclass(frozen=True)
class StyleConfig:
    """``dimensions`` is the width of the n-gram part after the singular value decomposition."""

    dimensions: int = 32
    hashed_features: int = 2**16
    seed: int = 0


@dataclass(frozen=True)
class StyleMap:
    """A fitted stylometric embedding: plain arrays, so that it is stored as safetensors.

    ``idf_H`` weighs H hashed n-grams, ``components_DH`` reduces them, ``mean_F`` and ``scale_F`` standardize surface
    features.
    """

    idf_H: np.ndarray
    components_DH: np.ndarray
    mean_F: np.ndarray
    scale_F: np.ndarray

    def __call__(self, histories: Sequence[Sequence[str]]) -> np.ndarray:
        """Embeddings of people, shape (people, D + F), from each one's own texts.

        A person without texts gets the zero vector: as far from everyone, and nearest to the most mixed cluster.
        """
        from sklearn.preprocessing import normalize

        grams = _counts(histories, len(self.idf_H)).multiply(self.idf_H).tocsr()
        reduced = normalize(grams) @ self.components_DH.T
        reduced /= np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-12)
        surface = np.stack([surface_features(texts) for texts in histories])
        # Clipped, and of unit length like the n-grams: one odd habit must not make a cluster of its own.
        standard = normalize(np.clip((surface - self.mean_F) / self.scale_F, -OUTLIER, OUTLIER))
        embedded = np.hstack([reduced, standard]).astype(np.float32)
        embedded[[not texts for texts in histories]] = 0.0
        return embedded


def fit_style_map(histories: Sequence[Sequence[str]], config: StyleConfig) -> StyleMap:
    """Learn the embedding from people's texts (one sequence of texts a person).

    Raises:
        ValueError: nobody wrote anything.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.preprocessing import StandardScaler, normalize

    histories = [texts for texts in histories if texts]
    if not histories:
        raise ValueError("no person has a text: style cannot be learned from an empty corpus")
    counts = _counts(histories, config.hashed_features)
    weights = TfidfTransformer(sublinear_tf=True).fit(counts)
    components = np.zeros((0, config.hashed_features), np.float32)
    if width := min(config.dimensions, len(histories) - 1):
        weighted = normalize(counts.multiply(weights.idf_).tocsr())
        components = TruncatedSVD(width, random_state=config.seed).fit(weighted).components_.astype(np.float32)
    scaler = StandardScaler().fit(np.stack([surface_features(texts) for texts in histories]))
    return StyleMap(weights.idf_.astype(np.float32), components, scaler.mean_, scaler.scale_)


def surface_features(texts: Sequence[str]) -> np.ndarray:
    """Habits of writing that hardly depend on the topic: lengths, case, punctuation, digits, function words."""
    texts = [text.translate(SAME_MARKS) for text in texts]
    joined = "\n".join(texts)
    categories = Counter(map(unicodedata.category, joined))
    characters, words = max(len(joined), 1), re.findall(r"\w+", joined)
    count = max(len(words), 1)
    lower = [word.lower() for word in words]
    starts = [text.lstrip()[:1] for text in texts]
    features = [
        np.log1p(len(words) / max(len(texts), 1)),
        sum(map(len, words)) / count,
        sum(character.isupper() for character in joined) / characters,
        sum(word.isupper() and len(word) > 1 for word in words) / count,
        sum(start.isupper() for start in starts) / max(len(texts), 1),
        sum(character.isdigit() for character in joined) / characters,
        sum(not character.isascii() for character in joined) / characters,
        categories["So"] / characters,  # emoji, whatever the script around them
        len(set(lower)) / count,
        *(joined.count(mark) / max(len(texts), 1) for mark in MARKS),
        *(sum(text.rstrip().endswith(mark) for text in texts) / max(len(texts), 1) for mark in ENDINGS),
        *(lower.count(word) / count for word in FUNCTION_WORDS),
    ]
    return np.array(features)


@dataclass(frozen=True)
class Clustering:
    """``centroids_KE`` and each person's cluster; ``curve`` holds what was measured per K when K was chosen."""

    centroids_KE: np.ndarray
    assignment: dict[str, int]
    curve: tuple[dict[str, float], ...] = ()


def nearest(centroids_KE: np.ndarray, embeddings_UE: np.ndarray) -> np.ndarray:
    """The nearest centroid of each person, shape (people,)."""
    # Without the person's own norm, which is the same for all centroids; no array of people x clusters x width.
    return ((centroids_KE**2).sum(1) - 2 * embeddings_UE @ centroids_KE.T).argmin(1)


def cluster(embeddings: Mapping[str, np.ndarray], clusters: int | None, seed: int, largest: int = 16) -> Clustering:
    """K-means over people; None for ``clusters`` chooses K by silhouette among the stable ones.

    Stability is the mean adjusted Rand index between clusterings of random halves, extended to everyone by the nearest
    centroid. More clusters than people are reduced to the number of people.
    """
    people = sorted(embeddings)
    if not people:
        raise ValueError("there is nobody to cluster: no person has a history")
    points = np.stack([embeddings[person] for person in people])
    curve: list[dict[str, float]] = []
    distinct = len(np.unique(points, axis=0))
    if clusters is None:
        clusters, curve = _choose(points, range(2, min(largest, distinct - 1, len(people) - 1) + 1), seed)
    clusters = min(clusters, distinct)
    centroids = _kmeans(points, clusters, seed)
    assigned = nearest(centroids, points)
    return Clustering(centroids, dict(zip(people, assigned.tolist(), strict=True)), tuple(curve))


def save_style_map(style_map: StyleMap, folder: Path) -> None:
    """Write as safetensors."""
    _save({field.name: getattr(style_map, field.name) for field in fields(StyleMap)}, folder / STYLE_MAP)


def load_style_map(file: Path) -> StyleMap:
    """What ``save_style_map`` wrote."""
    return StyleMap(**load_file(file))


def save_clustering(clustering: Clustering, folder: Path) -> None:
    """Write the centroids, and the curve where K was chosen, as data and as a plot."""
    _save({"centroids_KE": clustering.centroids_KE}, folder / CENTROIDS)
    if clustering.curve:
        (folder / "curve.json").write_text(json.dumps(clustering.curve, indent=2) + "\n")
        plot_curve(clustering, folder / "curve.png")


def load_centroids(file: Path) -> np.ndarray:
    """The centroids (K, E) that ``save_clustering`` wrote."""
    return load_file(file)["centroids_KE"]


def _save(arrays: Mapping[str, np.ndarray], file: Path) -> None:
    # safetensors writes an array's memory as it lies, whatever its strides: scikit-learn's are often in column order.
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)


def plot_curve(clustering: Clustering, file: Path) -> None:
    """Draw silhouette and stability against the number of clusters, the chosen one marked."""
    from matplotlib.figure import Figure  # no pyplot: it would take over a notebook's back end

    counts, chosen = [row["clusters"] for row in clustering.curve], len(clustering.centroids_KE)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhspan(STABLE, 1, color="#e3f0e3", zorder=0, label=f"stable (at least {STABLE})")
    for name, label, color, marker in (
        ("stability", "stability (adjusted Rand index of halves)", "#2a7f62", "s"),
        ("silhouette", "silhouette", "#1f4e8c", "o"),
    ):
        axes.plot(counts, [row[name] for row in clustering.curve], color=color, marker=marker, label=label)
    axes.axvline(chosen, color="#b5482a", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"chosen: {chosen}",
        (chosen, 1.0),
        xytext=(5, -10),
        textcoords="offset points",
        color="#b5482a",
        xycoords=("data", "axes fraction"),
    )
    lowest = min(0.0, *(row[name] for row in clustering.curve for name in ("silhouette", "stability")))
    axes.set(xlabel="clusters", ylabel="score", ylim=(lowest - 0.05, 1.0), xticks=counts)
    axes.set_title("How many clusters of style", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(0.0, 1.16), ncols=3)
    figure.savefig(file, dpi=140)


def _choose(points: np.ndarray, candidates: range, seed: int) -> tuple[int, list[dict[str, float]]]:
    from sklearn.metrics import silhouette_score

    curve = []
    for count in candidates:
        labels = nearest(_kmeans(points, count, seed), points)
        # Its cost grows with the square of the number of people: of many, some.
        sample = np.random.default_rng(seed).permutation(len(points))[:SILHOUETTE_PEOPLE]
        scored = 1 < len(set(labels[sample])) < len(sample)
        curve.append(
            {
                "clusters": float(count),
                "silhouette": float(silhouette_score(points[sample], labels[sample])) if scored else 0.0,
                "stability": _stability(points, count, seed),
                "smallest": float(np.bincount(labels, minlength=count).min()),
            }
        )
    # Twice the same people should fall together: a K whose clusters change from half to half is not a finding.
    stable = [row for row in curve if row["stability"] >= STABLE] or curve
    if not stable:
        return 1, curve
    return int(max(stable, key=lambda row: row["silhouette"])["clusters"]), curve


def _stability(points: np.ndarray, count: int, seed: int, repeats: int = 5) -> float:
    from sklearn.metrics import adjusted_rand_score

    generator = np.random.default_rng(seed)
    scores = []
    for _ in range(repeats):
        order = generator.permutation(len(points))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        if min(map(len, halves)) < count:
            return 0.0
        labels = [nearest(_kmeans(points[half], count, seed), points) for half in halves]
        scores.append(adjusted_rand_score(*labels))
    return float(np.mean(scores))


def _kmeans(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    return KMeans(clusters, n_init=10, random_state=seed).fit(points).cluster_centers_.astype(np.float32)


def _counts(histories: Sequence[Sequence[str]], width: int) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        analyzer="char_wb", ngram_range=(1, 4), n_features=width, alternate_sign=False, norm=None, lowercase=False
    )
    return vectorizer.transform(["\n".join(texts) for texts in histories])
