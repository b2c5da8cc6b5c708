from collections import Counter

import numpy as np
import pytest

from palate.corpora import schema
from palate.corpora.streams import CorpusError
from palate.corpora.worlds import personas


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    config = personas.PersonasConfig(out=str(tmp_path_factory.mktemp("personas") / "corpus"), people=80)
    return personas.prepare(config)


def test_every_text_shows_every_trait_of_its_writer(corpus):
    truth = personas.read_personas(corpus)
    for text in [*schema.read_items(corpus), *schema.read_questions(corpus)]:
        scores = personas.trait_scores(text.output, truth[text.user_id], text.source)
        assert set(scores) == set(personas.TRAITS)
        assert all(scores.values()), (text.output, scores)


def test_another_writers_text_scores_at_chance_on_personal_traits_and_full_on_the_familys(corpus):
    truth = personas.read_personas(corpus)
    users = list(truth)
    step = len(personas.FAMILIES)
    scores = [
        personas.trait_scores(text.output, truth[users[(users.index(text.user_id) + step) % len(users)]], text.source)
        for text in schema.read_questions(corpus)
    ]
    options = (
        personas.OPENINGS,
        personas.HEDGES,
        personas.ADJECTIVES,
        personas.CONNECTORS,
        personas.ORDERS,
        personas.NUMBERS,
        personas.SIGN_OFFS,
        personas.EMOTICONS,
    )
    chance = np.mean([1 / len(values) for values in options])
    assert personas.trait_accuracy(scores, personas.FAMILY_TRAITS) == 1
    assert abs(personas.trait_accuracy(scores) - chance) < 0.07  # 80 people, 8 traits: standard error about 0.017


def test_no_trait_depends_on_the_family(corpus):
    truth = personas.read_personas(corpus).values()
    for family in range(len(personas.FAMILIES)):
        members = [persona for persona in truth if persona.family == family]
        for trait in personas.PERSONAL_TRAITS:
            assert len(Counter(getattr(persona, trait) for persona in members)) > 1


def test_texts_do_not_repeat_and_questions_are_about_unseen_things(corpus):
    items, questions = schema.read_items(corpus), schema.read_questions(corpus)
    sources = [text.source for text in [*items, *questions]]
    assert len(set(sources)) == len(sources)
    assert not {item.source.split(";")[0] for item in items} & {one.source.split(";")[0] for one in questions}


def test_profiles_are_the_persons_items(corpus):
    owners = {item.item_id: item.user_id for item in schema.read_items(corpus)}
    for question in schema.read_questions(corpus):
        assert len(question.profile) == 12
        assert {owners[item] for item in question.profile} == {question.user_id}


def test_the_corpus_is_a_function_of_the_seed(corpus, tmp_path):
    again = personas.prepare(personas.PersonasConfig(out=str(tmp_path / "again"), people=80))
    other = personas.prepare(personas.PersonasConfig(out=str(tmp_path / "other"), people=80, seed=1))
    assert again.digest == corpus.digest
    assert other.digest != corpus.digest


def test_observed_traits_says_none_where_a_text_shows_nothing():
    observed = personas.observed_traits("")
    assert {name: observed[name] for name in ("layout", "case", "opening", "adjective", "order", "numbers")} == {
        "layout": None,
        "case": None,
        "opening": None,
        "adjective": None,
        "order": None,
        "numbers": None,
    }
    assert personas.observed_traits("It is neat <3")["numbers"] is None


def test_order_is_scored_only_with_the_source():
    persona = personas.draw_persona(0, np.random.default_rng(0))
    facts = personas.Facts("product", "kettle", "works fast", "hums", 3)
    text = personas.write_review(persona, facts)
    assert "order" not in personas.trait_scores(text, persona)
    swapped = text.replace("works fast", "X").replace("hums", "works fast").replace("X", "hums")
    assert personas.trait_scores(text, persona, facts.source)["order"]
    assert not personas.trait_scores(swapped, persona, facts.source)["order"]


def test_nobody_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="--people 0"):
        personas.prepare(personas.PersonasConfig(out=str(tmp_path / "corpus"), people=0))
