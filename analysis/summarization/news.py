"""The embedded default: news-like documents from seeds, with the sentences that carry the abstract marked.

A story has a cast (people, places, a company, numbers) and five facts. Two to four of them are in the abstract: without
their details, often in other words, some fused into one sentence. The article says those in sentences of their own,
among the facts left out, the same facts about another cast, and colour. A weekday marks a sentence of the abstract's
facts, but only in four of five cases, and one of five sentences with a weekday is none of these. The names of a split
are in no other, so that those of the test can only be copied.
"""

from __future__ import annotations

import random
import re
from functools import cache
from itertools import product
from typing import NamedTuple
from zlib import crc32

from analysis.registry import pick
from analysis.summarization.data import Document

COUNTS = {"train": 4000, "validation": 300, "test": 1000}
RELIABLE = 0.8  # share of key sentences with a cue, and share of sentences with a cue that are key
AHEAD = 0.5  # how often the first fact is moved into the first three sentences; lead bias is mild
COPIED = 0.4  # how often the abstract puts a fact as the article does, up to the first clause that can be dropped
FUSED = 0.4  # how often two facts share a sentence of the abstract where they need not
EARLIER = 0.3  # how often a sentence about another cast says so

CUED = """{source} confirmed on {day} that {clause} .
on {day} , {clause} .
{clause} , {source} said on {day} .
it emerged on {day} that {clause} .
{clause} , it was announced on {day} .
{clause} , according to a statement released on {day} .
by {day} it was clear that {clause} .
speaking on {day} , {source} said that {clause} .""".splitlines()
PLAIN = """{clause} .
{clause} .
{source} said that {clause} .
according to {source} , {clause} .
{clause} , {source} said .
local media reported that {clause} .
meanwhile , {clause} .
{clause} , according to people familiar with the matter .
it is understood that {clause} .""".splitlines()
BEFORE = [
    "in an earlier case , {clause} .",
    "in a separate case , {clause} .",
    "some time ago , {clause} .",
    "elsewhere , {clause} .",
]
JOINS = ["{} as {} .", "{} and {} .", "{} , while {} ."]

# "# topic: things; sources" begins a topic, "- subject | subject in the abstract" a fact, what is said of the subject
# follows, and "=>" what the abstract makes of that, in one way / or another. "*" is colour. Braces: see `_cast`.
STORIES = """
# accident: bus, coach, minibus, tour bus, school bus; police, rescuers, the fire service, officials
- a {thing} carrying {m} passengers from {town} | a {thing}
overturned on a sharp bend outside {place} after one of its tyres burst
=> crashed near {place} / flipped over near {place}
collided with a parked lorry in thick fog on the edge of {place}
=> hit a lorry near {place} / crashed into a lorry in fog
plunged into a ravine near {place} when its brakes failed
=> fell into a ravine near {place} / crashed after its brakes failed
- {n} people | {n} people
were killed at the scene and at least {m} others were taken to hospitals in {town}
=> died and {m} were hurt / were killed and dozens were injured
lost their lives , most of them students on their way home
=> died , most of them students / were killed , mostly students
had to be cut free from the wreckage and flown to {town} with serious injuries
=> were seriously hurt / were flown to hospital
- the driver , {person} , | driver {person}
was arrested on suspicion of falling asleep at the wheel
=> was arrested / was held after apparently falling asleep
told investigators that the steering had stopped working moments before
=> blamed the steering / said the steering failed
has been charged with dangerous driving and will appear in court next week
=> was charged / is to appear in court
- the company {org} , which owns the vehicle , | {org}
has suspended all its services until its {k} vehicles are inspected
=> halted its services / suspended services
offered to pay for the treatment of the injured and for the funerals
=> will pay for treatment / offered to help the injured
had been fined twice over poor maintenance by the transport authority
=> had been fined before / was fined twice over maintenance
- the main road between {place} and {town} | the road to {town}
will remain closed for at least {n} days while engineers clear the wreckage
=> stays closed for {n} days / is shut for days
is to get barriers and a lower speed limit after years of complaints
=> will get barriers / is to be made safer
* residents say the stretch has been known as a black spot for years .
* heavy rain had made the surface slippery for most of the afternoon .
* a memorial service is planned at the church of {place} .
* shoes , bags and school books lay scattered across both lanes .
* helicopters circled above the valley until nightfall .
* {surname} had worked as a driver for {k} years without an accident .
* volunteers from {town} brought blankets , soup and hot tea .
* the vehicle was {n} years old and had been serviced in the spring .
# sport: striker, goalkeeper, midfielder, defender, captain; the club, the coach, team officials, the federation
- {place} united | {place}
beat {town} rovers {g} - 1 after extra time to reach the final of the cup
=> reached the cup final / beat {town} to reach the final
lost {g} - 0 at home to {town} rovers , their worst defeat in {k} years
=> lost {g} - 0 to {town} / suffered their worst defeat in years
came from two goals down to draw with {town} rovers in front of {k},000 fans
=> drew with {town} / fought back to draw
- the {thing} {person} | {person}
scored in the last minute of the match with a header from a corner
=> scored late / headed a late goal
was sent off before half time for a reckless tackle on {other}
=> was sent off / was shown a red card
signed a new contract that will keep him at the club for {n} more years
=> signed a new deal / will stay for {n} years
- the manager {other} | manager {other}
resigned an hour after the final whistle , saying he had run out of ideas
=> resigned / quit after the match
praised the young players and promised to attack from the start in the next match
=> praised his young players / promised to attack
faces a ban of {n} matches for insulting the referee in the tunnel
=> faces a ban / may be banned for insulting the referee
- the owner of the club , {org} , | owner {org}
agreed to sell its shares to a group of investors for {m} million dollars
=> will sell the club / is selling for {m} million dollars
plans to build a stadium with {k},000 seats on the site of the old harbour
=> plans a new stadium / wants to build a stadium
- doctors at the club | doctors
expect {surname} to miss the rest of the season with a torn muscle
=> expect {surname} to miss the season / ruled {surname} out
cleared {surname} to play again {n} weeks after he broke his wrist
=> cleared {surname} to play / say {surname} is fit again
* the pitch had been cleared of snow only an hour before kick - off .
* the visitors had most of the ball but few chances before the break .
* supporters queued through the night for the last tickets .
* {surname} joined the club as a boy of {k} and never left .
* the two sides have met {m} times , and neither has won more often .
* scouts from {n} foreign clubs were watching from the stands .
* the television cameras showed an argument near the bench .
* shirts with the number of {surname} were sold out by noon .
# politics: health, housing, transport, education, pensions; the government, party officials, an aide, the ministry
- the {thing} minister , {person} , | {thing} minister {person}
resigned after reports that she had accepted gifts from {org}
=> resigned / quit over gifts
survived a vote of no confidence by only {n} votes
=> survived a no - confidence vote / kept her job by {n} votes
promised to spend {m} million dollars on {thing} in the next budget
=> promised more money / pledged {m} million dollars for {thing}
- lawmakers in {place} | lawmakers
approved a bill that will raise the tax on fuel by {n} percent
=> passed a fuel tax / raised the fuel tax
rejected a plan to move the parliament to {town} after a debate of {n} hours
=> rejected a move to {town} / voted against moving to {town}
voted to lower the voting age to {k} at the next election
=> lowered the voting age to {k} / voted to let people vote at {k}
- the opposition leader , {other} , | opposition leader {other}
called for early elections and accused the cabinet of hiding the costs
=> called for elections / wants an early vote
refused to join a coalition , ending {n} weeks of talks
=> refused a coalition / ended coalition talks
said he would challenge the decision before the highest court
=> will go to court / plans a legal challenge
- about {m},000 people | thousands
marched through the centre of {place} to protest against the plan
=> protested in {place} / marched against the plan
signed a petition that demands a public inquiry into the affair
=> demanded an inquiry / signed a petition
- the firm {org} | {org}
denied that it had paid for trips by members of the cabinet
=> denied paying for trips / denied wrongdoing
lost a contract worth {k} million dollars to run the land register
=> lost a contract / lost a {k} million dollar deal
* the debate went on until long after midnight .
* {surname} was once the youngest member of the chamber .
* polls have shown the two large parties level since the summer .
* few people outside the capital had heard of {surname} a year ago .
* reporters waited in the rain outside the ministry .
* the region of {town} has voted for the same party for {k} years .
* the budget is to be presented before the end of the month .
* critics called the timing of the announcement unfortunate .
# science: mice, bats, corals, bees, whales; researchers, the university, the authors, the journal
- a team led by {person} at the university of {place} | a team at {place}
found that {thing} can remember single sounds for up to {n} years
=> found {thing} remember sounds for years / showed that {thing} remember sounds
discovered a species of {thing} that was thought to have died out
=> found a lost species of {thing} / rediscovered {thing} thought extinct
showed that {thing} find their way by the magnetic field of the earth
=> found {thing} sense the magnetic field / showed how {thing} navigate
- the study , based on {m} animals , | the study
took {n} years and cost {k} million dollars , most of it from {org}
=> took {n} years / cost {k} million dollars
contradicts a theory that {other} had put forward decades ago
=> contradicts an old theory / challenges {other}
could help to protect the last colonies near {town}
=> could help to protect {thing} / may save colonies near {town}
- the biologist {other} , who was not involved , | {other}
called the results remarkable but warned that the sample was small
=> warned of the small sample / called the results remarkable
said the experiment must be repeated before anyone draws conclusions
=> wants it repeated / urged caution
- the foundation {org} | {org}
will pay for a laboratory in {town} with {m} new jobs
=> will fund a laboratory in {town} / pays for a new laboratory
withdrew its support after a dispute about who owns the data
=> withdrew its support / stopped funding in a data dispute
- {n} other laboratories | other laboratories
have begun to repeat the measurements with larger groups
=> are repeating the work / started to repeat it
failed to obtain the same results under controlled conditions
=> failed to repeat the results / could not confirm it
* the animals were filmed day and night with infrared cameras .
* {surname} first had the idea on a walk along the coast .
* nobody had looked for an effect of this kind before .
* the samples were kept in a cellar in {town} for {k} months .
* students carried the equipment up a steep path every morning .
* earlier work had relied on much smaller groups .
* {surname} keeps a photograph of the first specimen on her desk .
* the method had been developed for an entirely different purpose .
# business: phones, bicycles, batteries, furniture, shoes; the company, analysts, the union, a spokeswoman
- {org} , a maker of {thing} based in {place} , | {org}
will cut {m}00 jobs and close its oldest plant in {town}
=> is cutting {m}00 jobs / will close a plant in {town}
agreed to buy its rival in {town} for {k} million dollars
=> is buying its {town} rival / will pay {k} million dollars for a rival
recalled {m},000 {thing} because of a fault that can cause fires
=> recalled {thing} over fire risk / recalled {m},000 {thing}
- the chief executive , {person} , | chief executive {person}
will step down at the end of the year after {n} years at the top
=> will step down / is leaving after {n} years
blamed high energy prices and weak demand from abroad
=> blamed energy prices / pointed to weak demand
sold shares worth {k} million dollars on the eve of the news
=> sold shares before the news / had sold shares
- shares in the company | shares
fell by {k} percent , the steepest drop since it was listed
=> fell {k} percent / dropped sharply
rose by {n} percent in early trading before they lost most of the gains
=> rose briefly / gained , then fell back
- the union leader {other} | union leader {other}
announced a strike of {n} days and demanded talks with the owners
=> announced a strike / called a strike of {n} days
welcomed the decision as the best that workers could hope for
=> welcomed the decision / backed the plan
- regulators in {place} | regulators
opened an investigation into the prices of {thing}
=> are investigating / opened a price inquiry
fined the company {m} million dollars for misleading its customers
=> fined it {m} million dollars / imposed a fine
* the founder began with a single workshop and {n} employees .
* the market for {thing} has hardly grown for {k} months .
* workers gathered at the gates in {town} before dawn .
* the company has not paid a dividend since {surname} took over .
* competitors from overseas have doubled their share .
* a new factory was opened with a brass band only last spring .
* suppliers in {town} fear that they will be next .
* {surname} studied engineering before turning to finance .
# weather: storm, flood, blizzard, cyclone, tornado; forecasters, officials, the mayor, aid agencies
- a {thing} | a {thing}
swept across {place} and left {m},000 homes without power
=> cut power to {m},000 homes / hit {place} and cut power
destroyed {m} houses in the villages around {place}
=> destroyed homes near {place} / wrecked {m} houses
closed the airport of {place} for {n} days in a row
=> shut the airport of {place} / closed {place} airport
- at least {n} people | {n} people
died , among them a firefighter who had tried to reach a family in {town}
=> died , one of them a firefighter / were killed
are still missing after their boat was found empty near {town}
=> are missing / are missing near {town}
were rescued from the roof of a school by helicopter
=> were rescued from a roof / were saved by helicopter
- the governor , {person} , | governor {person}
declared an emergency and asked the army for help
=> declared an emergency / called in the army
told {m},000 residents of the coast to leave their homes
=> ordered people to leave / told residents to leave
defended the decision to open the dam above {town}
=> defended opening a dam / defended her decision
- the insurance company {org} | {org}
put the damage at {k} million dollars , more than in any year before
=> put damage at {k} million dollars / expects record costs
refused to pay for houses that were built too close to the river
=> refused to pay / will not pay for riverside houses
- the meteorologist {other} | {other}
warned that the worst was still to come in the next {n} days
=> warned of worse to come / said the worst was to come
expects the temperature to drop to normal before the weekend
=> expects normal weather soon / sees an end in sight
* schools and shops stayed closed for most of the week .
* the supermarkets ran out of bread , water and candles .
* boats were lying on their side along the promenade .
* an old oak in the park of {town} was torn out with its roots .
* {surname} flew over the region in a military aircraft .
* farmers say they have lost most of the harvest .
* the river had reached its highest level for {k} years .
* cats and dogs were brought to a sports hall in {town} .
# culture: film, novel, opera, album, exhibition; the museum, critics, the festival, her publisher
- the {thing} by {person} | the {thing} by {person}
won the main prize at the festival of {place} ahead of {n} rivals
=> won the top prize in {place} / won at the {place} festival
was withdrawn from the programme after complaints by relatives of {other}
=> was withdrawn / was dropped after complaints
broke the record for the first weekend with {m},000 visitors
=> broke a record / drew {m},000 visitors
- {person} , who grew up in {town} , | {person}
is to receive {k} million dollars for a work that has yet to begin
=> will get {k} million dollars / is paid in advance
gave the whole of the prize money to a school in {town}
=> gave the money to a school / donated the prize
announced that it would be the last work of a long career
=> will retire / announced a farewell
- a painting worth {k} million dollars | a painting
was stolen from the museum of {place} while the alarm was being repaired
=> was stolen from a museum / was taken in {place}
turned out to be a copy made by a pupil of the master
=> proved a copy / is not genuine
was returned to the family of {other} after a dispute of {n} years
=> was returned to a family / went back to its owners
- the critic {other} | critic {other}
described the evening as the finest in the house for a generation
=> praised the evening / called it the finest in years
left the theatre during the interval and later called the work empty
=> walked out / called it empty
- the sponsor {org} | sponsor {org}
will pay to restore the theatre of {town} , which has been shut for {n} years
=> will restore a theatre / pays for a theatre in {town}
ended its support in a row over the choice of director
=> ended its support / left in a row
* the applause lasted for almost {k} minutes .
* visitors waited in a line that reached around the square .
* {surname} wrote the first version on the backs of old letters .
* the costumes had been borrowed from a theatre in {town} .
* no photograph of the early version is known to exist .
* the room was dark except for a single lamp .
* {surname} rarely gives interviews and does not like to travel .
* tickets were being offered for several times their price .
# court: fraud, bribery, arson, robbery, blackmail; prosecutors, the court, police, defence lawyers
- {person} , a former accountant at {org} , | {person}
was sentenced to {n} years in prison for {thing}
=> was jailed for {n} years / got {n} years for {thing}
was cleared of {thing} after the main witness changed his story
=> was cleared of {thing} / was acquitted
pleaded guilty to {k} counts of {thing} in return for a lighter sentence
=> admitted {thing} / pleaded guilty
- the judge , {other} , | judge {other}
spoke of a breach of trust that had ruined {m} families
=> spoke of a breach of trust / said families were ruined
adjourned the hearing for {n} weeks because documents were missing
=> adjourned the hearing / delayed it {n} weeks
ruled that recordings made in {town} could not be used
=> barred recordings / threw out recordings
- investigators | investigators
found {m},000 dollars in cash under the floor of a house in {town}
=> found cash in a house / found {m},000 dollars in {town}
followed the money through {n} countries over {k} months
=> traced the money abroad / followed the money
lost a computer that held most of the evidence
=> lost evidence / mislaid a computer
- the victims of the scheme in {place} | victims in {place}
will receive half of what they lost from a special fund
=> get half their money back / will be repaid in part
are suing the bank for {m} million dollars
=> are suing a bank / want {m} million dollars from a bank
- the lawyer of the accused | the defence
announced an appeal within minutes of the verdict
=> will appeal / announced an appeal
argued that others at {org} had known about everything
=> said others knew / blamed others at {org}
* the public gallery was full on every day of the trial .
* {surname} showed no emotion and looked at the floor .
* the case began with an anonymous letter {n} years ago .
* neighbours in {town} remember a quiet and friendly family .
* the files fill {m} boxes in the cellar of the building .
* a key witness gave evidence by video link .
* the building was guarded by armed officers .
* jurors needed {n} days to agree .
"""

COLOUR = """it is not clear what will happen next .
a further announcement is expected in the coming weeks .
the news spread quickly , and reactions were mixed .
many questions remain open .
nobody was available for comment in the evening .
an earlier version of this report gave a different number .
some details could not be confirmed independently .
people in {place} talked of little else .
the matter has been discussed in {town} for {k} months .
the telephone at the office of {surname} was not answered .
it was the second time in {n} years that {place} made headlines .
a photograph of {surname} appeared on the front pages .
relatives of {surname} asked for privacy .
`` we did not expect this , '' said {witness} , who lives in {town} .
`` it could have been much worse , '' {witness} told reporters .
`` i have never seen anything like it , '' said {witness} , a teacher from {place} .
`` somebody has to explain this to us , '' {witness} said .
`` we will see what the next {n} months bring , '' said {witness} .
`` that is all i can say for now , '' {surname} said before leaving .
`` people here are tired of promises , '' said {witness} , a shopkeeper .""".splitlines()

FIRST = """
anna ben carla david elena frank grace hugo irene jack karen leon maria nick olga peter rosa simon tara victor wendy
adam bella clara dennis emma felix helen ivan julia
""".split()
STARTS = """
ald ash bar bel ben bran bur cal car cor dal del dor dun ed el fair fen gar gil glen grim had hal har hart hel hol hum
ing kel ken kil kir lam lan lin lor mal mar mel mer mil mor nor oak or pem pen quin rad ran red ros row ruth sal sel
shel sil stan sten sut tal tar thorn tol tor ul val ver wal war wes whit wil win wol wren
""".split()
MIDDLES = ["", "an", "el", "en", "er", "in", "ing", "or"]
PEOPLE = "ton son ley man wick sen ders ric gate kin more ster low ner ski ow by ett ard iss".split()
PLACES = "ford port ville ham bridge stead mouth burgh dale field haven minster pool combe worth".split()
FIRMS = ["group", "holdings", "partners", "industries", "brothers", "capital"]
NUMBERS = "two three four five six seven eight nine".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()


class Fact(NamedTuple):
    """subject, short: in the article and in the abstract; said: what is said of it, and how the abstract puts that."""

    subject: str
    short: str
    said: list[tuple[str, list[str]]]


class Topic(NamedTuple):
    things: list[str]
    sources: list[str]
    facts: list[Fact]
    colour: list[str]


@cache
def topics() -> dict[str, Topic]:
    """What STORIES says."""
    found: dict[str, Topic] = {}
    said = ""  # the sentence that the line "=> ..." after it restates
    for line in STORIES.strip().splitlines():
        if line.startswith("# "):
            name, lists = line[2:].split(": ")
            topic = found[name] = Topic(*(part.split(", ") for part in lists.split("; ")), [], [])
        elif line.startswith("- "):
            topic.facts.append(Fact(*line[2:].split(" | "), []))
        elif line.startswith("* "):
            topic.colour.append(line[2:])
        elif line.startswith("=> "):
            topic.facts[-1].said.append((said, line[3:].split(" / ")))
        else:
            said = line
    return found


@cache
def names(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Surnames and places of a split; a name's checksum says in which it is, so none is in two."""
    share = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[split]
    people, places = ({"".join(parts) for parts in product(STARTS, MIDDLES, ends)} for ends in (PEOPLE, PLACES))
    words = set(STORIES.split())  # corner and valley would be names, too
    surnames, places = (
        tuple(sorted(name for name in known - words if crc32(name.encode()) % 5 in share))
        for known in (people - places, places)
    )
    return surnames, places


def _numbers(rng: random.Random) -> dict[str, str]:
    """n: a few, as a word; g: goals; k: one or two dozen; m: dozens."""
    return dict(n=rng.choice(NUMBERS), g=str(rng.randint(2, 5)), k=str(rng.randint(11, 23)), m=str(rng.randint(24, 98)))


def _cast(rng: random.Random, topic: Topic, surnames: list[str], places: list[str]) -> dict[str, str]:
    """Who and what a story is about, by the slots of its sentences; four surnames, two places."""
    first = rng.sample(FIRST, 3)
    return dict(
        surname=surnames[0],
        person=f"{first[0]} {surnames[0]}",
        other=f"{first[1]} {surnames[1]}",
        witness=f"{first[2]} {surnames[2]}",
        org=f"{surnames[3]} {rng.choice(FIRMS)}",
        place=places[0],
        town=places[1],
        thing=rng.choice(topic.things),
        **_numbers(rng),
    )


def _brief(rng: random.Random, said: str, short: list[str]) -> str:
    """What the abstract makes of what the article says."""
    return re.split(" (?:,|after|because|before|when|while) ", said)[0] if rng.random() < COPIED else rng.choice(short)


def _abstract(rng: random.Random, clauses: list[tuple[str, str]]) -> list[str]:
    """Two or three sentences of subjects and what the abstract says of them, neighbours fused."""
    fused = max(len(clauses) - 3, min(len(clauses) - 2, int(rng.random() < FUSED)))
    first = rng.randrange(len(clauses) - 1)  # of the two that are fused
    said = []
    for i, (subject, does) in enumerate(clauses):
        if fused and i == first + 1:
            before = clauses[first]
            said[-1] = (
                f"{subject} {before[1]} and {does} ."
                if before[0] == subject
                else rng.choice(JOINS).format(" ".join(before), f"{subject} {does}")
            )
        else:
            said.append(f"{subject} {does} .")
    return said


def document(split: str, index: int) -> Document:
    """The document with this number in a split, the same on every machine; labels: 1 for its key sentences."""
    rng = random.Random(f"news {split} {index}")
    topic = topics()[rng.choice(sorted(topics()))]
    surnames, places = rng.sample(names(split)[0], 8), rng.sample(names(split)[1], 4)
    cast, others = _cast(rng, topic, surnames[:4], places[:2]), _cast(rng, topic, surnames[4:], places[2:])
    day = rng.choice(DAYS)
    key = [0, *sorted(rng.sample(range(1, 5), rng.randint(1, 3)))]
    chosen = [rng.choice(fact.said) for fact in topic.facts]
    alike = [(i, cast) for i in range(5) if i not in key]
    alike += [(i, others) for i in rng.sample(range(5), rng.randint(1, 4))]
    cue = (1 - RELIABLE) * len(key) / len(alike)  # wrong cues; the right ones are RELIABLE * len(key)

    def sentence(i: int, who: dict[str, str], p: float) -> str:
        said = chosen[i] if who is cast else rng.choice(topic.facts[i].said)
        frames = CUED if rng.random() < p else BEFORE if who is others and rng.random() < EARLIER else PLAIN
        clause = f"{topic.facts[i].subject} {said[0]}".format(**who)
        return rng.choice(frames).format(clause=clause, source=rng.choice(topic.sources), day=day)

    keys = [sentence(i, cast, RELIABLE) for i in key]
    rest = [sentence(i, who, cue) for i, who in alike]
    colour = [*rng.sample(topic.colour, rng.randint(2, 6)), *rng.sample(COLOUR, rng.randint(1, 6))]
    rest += [line.format(**cast | _numbers(rng)) for line in colour][: 20 - len(keys) - len(rest)]
    article = [(said, 1) for said in keys] + [(said, 0) for said in rest]
    rng.shuffle(article)
    if rng.random() < AHEAD:
        article.remove((keys[0], 1))
        article.insert(rng.randrange(3), (keys[0], 1))
    clauses = []
    for i in key:
        short = topic.facts[i].short
        name = "{surname}" if rng.random() < 0.5 else "{person}"
        clauses.append((short.replace("{person}", name).format(**cast), _brief(rng, *chosen[i]).format(**cast)))
    return Document(
        [said.split() for said, _ in article],
        [said.split() for said in _abstract(rng, clauses)],
        [label for _, label in article],
        f"{split}-{index:04d}",
    )


def documents(split: str, limit: int | None = None) -> list[Document]:
    """The first `limit` documents of train, validation or test (None: as many as COUNTS says)."""
    count = pick(COUNTS, split, "split")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is the number of documents and must be at least 1, got {limit}")
    return [document(split, index) for index in range(count if limit is None else limit)]
