"""The decision core of converge, driven through thousands of histories against simulated nodes and a gateway."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torchrelay.delivery.plan import (
    LOADING,
    Abandon,
    Admit,
    Advance,
    Begin,
    Commit,
    Hold,
    NodeView,
    Refuse,
    Release,
    Rest,
    Route,
    Routing,
    Step,
    Underway,
    View,
    Withdraw,
    next_step,
)

A, B, C, BAD, CRASHING = (Release(name, f"digest-{name}") for name in ("1", "2", "3", "bad", "crashing"))
ADMITTED = (A, B, C, CRASHING)
STAGES = (0, 5, 25)


@dataclass
class SimulatedNode:
    name: str
    up: bool = True
    held: set[Release] = field(default_factory=set)
    sick: set[Release] = field(default_factory=set)


@dataclass
class World:
    """A perimeter as `converge` meets it, whose executor here does what each step says and nothing else."""

    keeps_last: bool = True
    warm: int = 1
    requested: Release | None = None
    known: bool = True
    verdicts: dict[Release, str] = field(default_factory=dict)
    live: Release | None = None
    served: list[Release] = field(default_factory=list)
    underway: Underway | None = None
    judgement: str = "bake"
    fault: str | None = None
    weights: dict[Release, int] = field(default_factory=dict)
    mirror: Release | None = None
    routed_nodes: dict[Release, frozenset[str]] = field(default_factory=dict)
    draining: set[Release] = field(default_factory=set)
    gateway_up: bool = True
    nodes: tuple[SimulatedNode, ...] = field(default_factory=lambda: (SimulatedNode("one"), SimulatedNode("two")))
    stages: tuple[int, ...] = STAGES
    committed: list[Release] = field(default_factory=list)

    def view(self) -> View:
        verdict = self.verdicts.get(self.requested) if self.requested else None
        if self.requested in self.served:
            verdict = "admitted"
        return View(
            known=self.known,
            requested=self.requested if self.known else None,
            verdict=verdict,  # type: ignore[arg-type]
            live=self.live,
            warm=frozenset(self.served[len(self.served) - self.warm :]),
            underway=self.underway,
            judgement=self.judgement,  # type: ignore[arg-type]
            reason="because",
            fault=self.fault,
            nodes=tuple(
                NodeView(n.name, n.up, frozenset(n.held - n.sick), frozenset(n.held))
                if n.up
                else NodeView(n.name, False)
                for n in self.nodes
            ),
            routing=Routing(dict(self.weights), self.mirror, dict(self.routed_nodes), frozenset(self.draining))
            if self.gateway_up
            else None,
            keeps_last=self.keeps_last,
        )

    def step(self) -> Step:
        step = next_step(self.view())
        self.execute(step)
        return step

    def execute(self, step: Step) -> None:
        match step:
            case Admit(release):
                self.verdicts[release] = "admitted" if release in ADMITTED else "refused"
            case Begin(release):
                fast = release in self.served or self.live is None
                self.underway = Underway(release, LOADING, () if fast else self.stages)
                self.judgement, self.fault = "bake", None
            case Hold(name, releases):
                node = next(node for node in self.nodes if node.name == name)
                if CRASHING in releases - node.held:
                    self.fault = "it crashed"
                    releases -= {CRASHING}
                gone = node.held - releases
                assert not gone & {release for release, weight in self.weights.items() if weight}, "still routed"
                assert not gone & self.draining, "requests in flight"
                node.held, node.sick = set(releases), set()
            case Route(weights, mirror, nodes):
                self.draining |= {one for one in self.weights if one not in dict(weights)} & self.anywhere()
                self.weights, self.mirror, self.routed_nodes = dict(weights), mirror, dict(nodes)
            case Advance(stage):
                assert self.underway is not None
                self.underway, self.judgement = replace(self.underway, stage=stage), "bake"
            case Refuse(release, _):
                self.verdicts[release] = "refused"
                self.served = [one for one in self.served if one != release]
                self.underway, self.fault, self.judgement = None, None, "bake"
            case Abandon():
                self.underway, self.judgement = None, "bake"
            case Commit(release):
                if release in self.served:
                    self.served = self.served[: self.served.index(release)]
                elif self.live and self.live != release:
                    self.served.append(self.live)
                self.live, self.underway = release, None
                self.committed.append(release)
            case Withdraw():
                self.live, self.served = None, []

    def anywhere(self) -> set[Release]:
        return {release for node in self.nodes for release in node.held}

    def settle(self) -> Rest:
        """What an undisturbed converge comes to, every stage passing and every request answered."""
        for _ in range(100):
            self.judgement = "pass"
            step = self.step()
            if isinstance(step, Rest) and not step.soon:
                return step
            self.draining.clear()
        raise AssertionError(f"no end: {step}")


def served_by(world: World) -> dict[Release, int]:
    return {release: weight for release, weight in world.weights.items() if weight}


def promoted(world: World, release: Release) -> World:
    world.requested = release
    world.settle()
    return world


@pytest.mark.parametrize("keeps_last", [True, False])
def test_a_first_version_gets_all_requests_and_both_nodes_hold_it(keeps_last: bool) -> None:
    world = promoted(World(keeps_last=keeps_last), A)
    assert (world.live, served_by(world)) == (A, {A: 100})
    assert [node.held for node in world.nodes] == [{A}, {A}]


def test_the_next_version_comes_in_by_its_stages() -> None:
    world = promoted(World(), A)
    world.requested = B
    seen = []
    while world.live != B:
        world.judgement = "pass"
        step = world.step()
        if isinstance(step, Route):
            seen.append((served_by(world), world.mirror))
    assert seen == [({A: 100}, B), ({A: 95, B: 5}, A), ({A: 75, B: 25}, A), ({B: 100}, None)]


def test_every_node_holds_the_candidate_before_it_gets_anything() -> None:
    world = promoted(World(), A)
    world.requested = B
    while world.mirror is None:
        world.judgement = "pass"
        world.step()
    assert [B in node.held for node in world.nodes] == [True, True]


def test_a_breach_gives_everything_back_in_the_next_two_steps_and_is_not_tried_again() -> None:
    world = promoted(World(), A)
    world.requested = B
    while served_by(world) != {A: 75, B: 25}:
        world.judgement = "pass"
        world.step()
    world.judgement = "breach"
    assert isinstance(world.step(), Refuse)
    assert isinstance(world.step(), Route)
    assert served_by(world) == {A: 100}
    world.settle()
    assert world.committed == [A]
    assert [node.held for node in world.nodes] == [{A}, {A}]


def test_the_way_back_takes_no_stages_and_finds_the_version_loaded() -> None:
    world = promoted(promoted(World(), A), B)
    assert all(A in node.held for node in world.nodes)
    world.requested = A
    steps = []
    while world.live != A:
        steps.append(type(world.step()).__name__)
    assert steps == ["Begin", "Advance", "Route", "Commit"]


def test_the_way_back_does_not_wait_for_the_last_long_request() -> None:
    world = promoted(promoted(World(warm=0), A), B)
    world.requested = A
    while world.live != A:
        world.judgement = "pass"
        world.step()
    assert world.draining == {B}
    world.requested = B
    for _ in range(12):
        world.judgement = "pass"
        world.step()
    assert (world.live, served_by(world)) == (B, {B: 100})


def test_a_breach_is_answered_while_the_registry_and_a_node_are_away() -> None:
    world = promoted(World(), A)
    world.requested = B
    while served_by(world) != {A: 95, B: 5}:
        world.judgement = "pass"
        world.step()
    world.known, world.nodes[1].up = False, False
    world.judgement = "breach"
    world.step()
    world.step()
    assert served_by(world) == {A: 100}


def test_no_stage_is_entered_while_the_alias_cannot_be_read() -> None:
    world = promoted(World(), A)
    world.requested = B
    while served_by(world) != {A: 95, B: 5}:
        world.judgement = "pass"
        world.step()
    world.known = False
    for _ in range(10):
        world.judgement = "pass"
        assert isinstance(world.step(), Rest)
    assert served_by(world) == {A: 95, B: 5}


def test_a_deleted_alias_withdraws_in_one_perimeter_and_changes_nothing_in_the_other() -> None:
    dev, production = promoted(World(keeps_last=False), A), promoted(World(keeps_last=True), A)
    promoted(dev, None)  # type: ignore[arg-type]
    promoted(production, None)  # type: ignore[arg-type]
    assert (dev.live, served_by(dev), dev.anywhere()) == (None, {}, set())
    assert (production.live, served_by(production)) == (A, {A: 100})


class Perimeter(RuleBasedStateMachine):
    """Anything may happen between any two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(requested=st.sampled_from([A, B, C, BAD, CRASHING, None]))
    def somebody_moves_the_alias(self, requested: Release | None) -> None:
        self.world.requested = requested

    @rule()
    def a_step(self) -> None:
        self.world.step()

    @rule()
    def a_step_of_which_only_the_intention_is_left(self) -> None:
        """Killed before the effect: what is remembered is tried again."""
        next_step(self.world.view())

    @rule(judgement=st.sampled_from(["bake", "pass", "pass", "breach"]))
    def the_stage_is_judged(self, judgement: str) -> None:
        self.world.judgement = judgement

    @rule(up=st.booleans())
    def the_registry_goes_or_comes(self, up: bool) -> None:
        self.world.known = up

    @rule(which=st.sampled_from([0, 1]))
    def a_node_dies_and_forgets(self, which: int) -> None:
        self.world.nodes[which].up = False
        self.world.nodes[which].held = set()

    @rule(which=st.sampled_from([0, 1]))
    def a_node_returns(self, which: int) -> None:
        self.world.nodes[which].up = True

    @rule(which=st.sampled_from([0, 1]), release=st.sampled_from([A, B, C]))
    def a_version_falls_sick(self, which: int, release: Release) -> None:
        node = self.world.nodes[which]
        node.sick |= {release} & node.held

    @rule(which=st.sampled_from([0, 1]))
    def an_engine_comes_back_empty(self, which: int) -> None:
        self.world.nodes[which].held = set()

    @rule()
    def the_last_requests_are_answered(self) -> None:
        self.world.draining.clear()

    @rule(up=st.booleans())
    def the_gateway_goes_or_comes(self, up: bool) -> None:
        self.world.gateway_up = up

    @precondition(lambda self: self.world.live is not None)
    @invariant()
    def production_always_serves_what_was_admitted(self) -> None:
        shares = served_by(self.world)
        assert sum(shares.values()) == 100
        assert all(release in ADMITTED and release is not CRASHING for release in shares)

    @invariant()
    def only_two_versions_at_most_share_the_requests(self) -> None:
        allowed = {self.world.live, self.world.underway.candidate if self.world.underway else None}
        unexpected = {one for one in served_by(self.world) if one not in allowed}
        assert len(served_by(self.world)) <= 2
        assert not unexpected or len(unexpected) == 1  # a candidate that was given up a step ago

    @invariant()
    def what_was_refused_never_serves_whole(self) -> None:
        assert all(release in ADMITTED for release in self.world.committed)

    @invariant()
    def left_alone_it_reaches_what_is_asked_for(self) -> None:
        world = replace(
            self.world,
            known=True,
            gateway_up=True,
            nodes=tuple(
                SimulatedNode(node.name, held=set(node.held), sick=set(node.sick)) for node in self.world.nodes
            ),
            verdicts=dict(self.world.verdicts),
            served=list(self.world.served),
            draining=set(),
            committed=list(self.world.committed),
        )
        before = world.live
        world.settle()
        refused = world.requested is None or world.verdicts.get(world.requested) == "refused"
        goal = before if refused and world.requested != before else world.requested or before
        assert world.live == goal
        assert served_by(world) == ({goal: 100} if goal else {})
        needed = {goal, *world.served[len(world.served) - world.warm :]} if goal else set()
        assert all(node.held - node.sick == needed for node in world.nodes)


Perimeter.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestPerimeter = Perimeter.TestCase
