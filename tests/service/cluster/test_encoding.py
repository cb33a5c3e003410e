"""Messages as JSON: whatever is sent is received, and whatever is no message is an error that says where.

Knows the fields of messages. Does not know what they are for.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ema_service.cluster import (
    Adjustment,
    Answer,
    Arrival,
    Ask,
    Change,
    Checkpoint,
    Kept,
    MalformedMessage,
    Message,
    Proposal,
    Propose,
    Record,
    Refusal,
    Report,
    Resolve,
    Seating,
    Term,
    Ticket,
    Vote,
    decode,
    encode,
)

KINDS = (Adjustment, Answer, Arrival, Ask, Change, Checkpoint, Propose, Record, Refusal, Report, Resolve)

numbers = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(codec="utf-8"))
terms = st.builds(Term, numbers, texts)
tickets = st.builds(Ticket, numbers, st.none() | numbers, texts)
seatings = st.builds(Seating, terms, numbers, texts)
proposals = st.builds(Proposal, tickets, st.none() | texts, st.none() | numbers, numbers, st.none() | seatings)
votes = st.builds(Vote, proposals, texts)
records = st.builds(
    Record, terms, numbers, numbers, st.none() | votes, st.none() | votes, st.booleans(), numbers, seatings
)
messages = st.one_of(
    st.builds(Adjustment, texts, st.none() | st.floats(allow_nan=False, allow_infinity=False), st.none() | texts),
    st.builds(Answer, texts, st.booleans(), texts),
    st.builds(Arrival, numbers, numbers, texts, numbers, numbers, st.booleans()),
    st.builds(Ask, numbers, terms, seatings),
    st.builds(Change, texts, texts, numbers),
    st.just(Checkpoint()),
    st.builds(Propose, numbers, terms, proposals),
    records,
    st.builds(Refusal, numbers, terms, tickets, texts),
    st.builds(
        Report,
        numbers,
        records,
        st.none() | proposals,
        st.booleans(),
        st.builds(Kept, numbers, numbers),
        st.booleans(),
    ),
    st.builds(Resolve, numbers, terms, numbers, st.booleans(), texts),
)
JUNK: tuple[Any, ...] = (None, True, -1, 2**63, 0.5, "x", "\ud800", [], {}, {"zz": 1})


@given(messages)
def test_what_is_sent_is_received(message: Message) -> None:
    """A message comes back as it was, of the same types, from one line of ASCII; as bytes too."""
    text = encode(message)

    assert text.isascii()
    assert "\n" not in text
    assert decode(text, *KINDS) == message
    assert repr(decode(text.encode(), *KINDS)) == repr(message)


@given(messages, st.data())
def test_what_lacks_or_adds_a_member_is_refused(message: Message, data: st.DataObject) -> None:
    """Every member has to be there, in every object, those with a default as well, but for what records of earlier
    servers lack; and no other."""
    whole = json.loads(encode(message))
    objects = list(objects_in(whole))
    chosen = data.draw(st.sampled_from(objects))
    members = sorted(chosen.keys() - {"seating"})
    if members and data.draw(st.booleans()):
        del chosen[data.draw(st.sampled_from(members))]
    else:
        chosen["zz"] = 0

    with pytest.raises(MalformedMessage, match="member"):
        decode(json.dumps(whole), *KINDS)


def test_records_of_earlier_servers_are_read() -> None:
    """They know of no seating, and of everybody's part in what is decided."""
    record = Record(vote=Vote(Proposal(Ticket(0, 1, "k")), "o"))
    said = json.loads(encode(record))
    del said["record"]["seating"], said["record"]["vote"]["proposal"]["seating"]

    assert decode(json.dumps(said), Record) == record


def objects_in(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, dict):
        return []
    return [value, *(each for inner in value.values() for each in objects_in(inner))]


@given(messages, st.data())
def test_what_is_of_another_type_is_refused(message: Message, data: st.DataObject) -> None:
    """A value of another type is an error, or was one that the member may have; nothing is converted."""
    whole = json.loads(encode(message))
    objects = [each for each in objects_in(whole) if each and each is not whole]
    assume(objects)
    chosen = data.draw(st.sampled_from(objects))
    name, junk = data.draw(st.sampled_from(sorted(chosen))), data.draw(st.sampled_from(JUNK))
    chosen[name] = junk

    if junk in (None, True, 0.5, "x"):
        with contextlib.suppress(MalformedMessage):
            assert json.loads(encode(decode(json.dumps(whole), *KINDS))) == whole
    else:
        with pytest.raises(MalformedMessage, match=name):
            decode(json.dumps(whole), *KINDS)


@given(st.text() | st.binary())
def test_whatever_comes_is_a_message_or_an_error(text: str | bytes) -> None:
    """Nothing else is ever raised."""
    with pytest.raises(MalformedMessage):
        decode(text, *KINDS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON: JSONDecodeError: Expecting property name"),
        (b"\xff\xfe\xfd", "not JSON"),
        ("[" * 100_000, "not JSON: RecursionError"),
        ("9" * 5_000, "not JSON"),
        ("[]", "the message: expected an object with one member: ask or resolve, got a list"),
        ('{"ask":{},"resolve":{}}', "the message: expected an object with one member"),
        ('{"report":{}}', "the message: expected an object with one member: ask or resolve, got 'report'"),
        ('{"ask":null}', "ask: expected an object, got null"),
        ('{"ask":{"shard":0,"seating":null}}', "ask lacks member 'term'"),
        ('{"ask":{"shard":0,"term":{"number":1,"name":"c"},"seating":{},"zz":1}}', "ask has an unknown member 'zz'"),
        (
            '{"ask":{"shard":0,"shard":0,"term":{"number":1,"name":"c"},"seating":{}}}',
            "a member stands twice in an object",
        ),
        (
            '{"ask":{"shard":true,"term":{"number":1,"name":"c"},"seating":{}}}',
            "ask.shard: expected a number from 0 to",
        ),
        (
            '{"ask":{"shard":0,"term":{"number":"1","name":"c"},"seating":{}}}',
            'ask.term.number: expected a number .*, got "1"',
        ),
        (
            '{"ask":{"shard":0,"term":{"number":-1,"name":"c"},"seating":{}}}',
            "ask.term.number: expected a number .*, got -1",
        ),
        ('{"ask":{"shard":0,"term":{"number":1,"name":"\\ud800"},"seating":{}}}', "ask.term.name: expected a string"),
    ],
)
def test_mistake_is_named(text: str | bytes, says: str) -> None:
    """What is wrong is told with its place."""
    with pytest.raises(MalformedMessage, match=says):
        decode(text, Ask, Resolve)


@pytest.mark.parametrize("decay", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_no_number_is_endless(decay: str) -> None:
    """What Python's reader takes for a number, and JSON does not."""
    with pytest.raises(MalformedMessage):
        decode(f'{{"adjustment":{{"kind":"decay","decay":{decay},"average":null}}}}', Adjustment)


def test_message_of_the_other_direction_is_refused() -> None:
    """Who expects questions takes no reports."""
    with pytest.raises(MalformedMessage, match="got 'report'"):
        decode(encode(Report(0, Record())), Ask, Propose, Resolve)


def test_form_of_a_message() -> None:
    """The very bytes: two versions of the service that run side by side understand each other, or say that they do
    not."""
    assert encode(Resolve(1, Term(3, "5f0c"), 9, committed=True)) == (
        '{"resolve":{"shard":1,"term":{"number":3,"name":"5f0c"},"edition":9,"committed":true,"reason":""}}'
    )
    assert encode(Report(0, Record(vote=Vote(Proposal(Ticket(0, 5, "u")), "1.1")))) == (
        '{"report":{"shard":0,"record":{"term":{"number":0,"name":""},"edition":0,"revision":0,"made":null,'
        '"vote":{"proposal":{"ticket":{"base":0,"step":5,"key":"u"},"change":null,"back":null,"settles":0,'
        '"seating":null,"word":"","to":""},"outcome":"1.1"},"lost":false,"settled":0,'
        '"seating":{"term":{"number":0,"name":""},"number":0,"without":""}},'
        '"waiting":null,"overdue":false,"kept":{"older":0,"newer":0},"returns":false,"damaged":false}}'
    )
