import json
from collections import Counter

import pytest

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.phrasebook import INTENTS, SLOTS, VAGUE
from fleetune.toolkit.utterances import LABELS, generate, make_corpus, write_lines


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(3, num_train=800, num_test=300)


def test_equal_seeds_give_equal_lines_and_others_do_not():
    assert generate(5, 60, 3) == generate(5, 60, 3)
    assert generate(5, 60, 3) != generate(6, 60, 3)


def test_a_speaker_says_the_same_whoever_else_talks():
    alone = generate(5, 20, 1)
    assert generate(5, 60, 3)[:20] == alone


def test_counts_are_as_asked_and_shared_evenly():
    lines = generate(0, 101, 4)
    assert sorted(Counter(line.speaker for line in lines).values()) == [25, 25, 25, 26]


def test_no_line_is_said_twice_and_no_test_line_is_in_train(corpus):
    train = [line.text for lines in corpus.train.values() for line in lines]
    test = [line.text for line in corpus.test]
    assert len({*train, *test}) == len(train) + len(test) == 1100


def test_test_speakers_are_strangers(corpus):
    assert not {line.speaker for line in corpus.test} & corpus.train.keys()


def test_labels_are_skewed_between_speakers_and_level_in_the_test(corpus):
    top = [Counter(line.label for line in lines).most_common(3) for lines in corpus.train.values()]
    assert all(sum(count for _, count in three) > 0.35 * 200 for three in top)
    assert len({three[0][0] for three in top}) > 1
    test = Counter(line.label for line in corpus.test)
    assert set(test) == set(LABELS)
    assert max(test.values()) < 3 * min(test.values())


def test_speakers_have_habits(corpus):
    """The same slot is filled differently: each speaker's favourite opening covers far more than its fair share."""
    openings = [Counter(line.text.split()[0] for line in lines) for lines in corpus.train.values()]
    favourites = [counts.most_common(1)[0] for counts in openings]
    assert all(count > 15 for _, count in favourites)
    assert len({word for word, _ in favourites}) > 1


@pytest.mark.parametrize(
    "pair", [("lights_on", "lights_off"), ("heating_up", "heating_down"), ("music_play", "tv_watch")]
)
def test_intents_share_their_words(pair):
    words: dict[str, Counter[str]] = {label: Counter() for label in pair}
    for line in generate(1, 1500, 3):
        if line.label in words:
            words[line.label].update(line.text.split())
    one, other = ({word for word, count in counts.items() if count >= 3} for counts in words.values())
    assert len(one & other) > 0.5 * min(len(one), len(other))


def test_some_lines_fit_several_intents():
    lines = [line for line in generate(1, 1500, 3) if " it off" in line.text or " that down" in line.text]
    assert len({line.label for line in lines}) > 1


def test_every_slot_and_label_in_the_phrasebook_exists():
    phrases = [
        *(p for ps in (*INTENTS.values(), *VAGUE.values()) for p in ps),
        *(p for ps in SLOTS.values() for p in ps),
    ]
    used = {part.split("}")[0] for phrase in phrases for part in phrase.split("{")[1:]}
    assert used == SLOTS.keys()
    assert {label for labels in VAGUE for label in labels} <= INTENTS.keys()


def test_lines_are_written_as_json_lines(tmp_path):
    lines = generate(0, 5, 1)
    write_lines(tmp_path / "a.jsonl", lines)
    read = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert read == [line._asdict() for line in lines]


@pytest.mark.parametrize(("lines", "speakers", "skew"), [(3, 4, 1.0), (3, 0, 1.0), (3, 1, 0.0)])
def test_impossible_numbers_are_refused(lines, speakers, skew):
    with pytest.raises(ConfigError, match="need lines >= speakers"):
        generate(0, lines, speakers, skew=skew)
