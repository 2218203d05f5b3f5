"""The model of Postgres does what Postgres does on a good day: it streams, waits, promotes, crashes and comes back."""

from __future__ import annotations

from postgres_stage import all_of, chain_of, staged


def test_a_commit_is_acknowledged_once_the_standby_has_flushed_it() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a, all_of(b))
        stage.standby(b, a)
        commit = stage.commit(a, "row")
        stage.until(lambda: stage.outcome("row"))
        assert stage.outcome("row") == "acknowledged"
        assert b.entries()[-1] is commit.entry
        assert stage.acknowledged == [commit.entry]
        stage.run(0.1)
        assert stage.rows(b) == ("row",)


def test_without_a_standby_a_commit_waits_and_is_invisible() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a, all_of(b))
        stage.commit(a, "row")
        stage.run(10)
        assert stage.outcome("row") is None
        assert stage.rows(a) == ()
        stage.commit(a, "local", synchronous=False)
        stage.run(0.1)
        assert stage.outcome("local") == "acknowledged"
        assert stage.rows(a) == ("local",)


def test_a_promotion_takes_the_claimed_timeline() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a, all_of(b))
        stage.standby(b, a)
        stage.commit(a, "row")
        stage.run(1)
        a.running.kill_all()
        fork = b.end
        b.write(primary_conninfo="")
        stage.run(1)
        chain = chain_of((9, 1, fork))
        assert stage.do(b, b.port.promote(chain, b.relay, deadline_s=10)) == 9
        assert b.running.read_write
        assert stage.rows(b) == ("row",)
        assert sorted(b.running.data.histories) == list(range(2, 10))


def test_a_former_primary_follows_across_a_clean_fork() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a, all_of(b))
        stage.standby(b, a)
        stage.commit(a, "before")
        stage.run(1)
        a.running.signal("INT")
        stage.until(lambda: a.exits)
        assert a.exits == ["stopped"]
        fork = b.end
        assert fork == a.end
        b.write(primary_conninfo="")
        stage.run(1)
        stage.do(b, b.port.promote(chain_of((4, 1, fork)), b.relay, deadline_s=10))
        b.running.data.slots.add(a.member_id)
        a.running.data.standby_signal = True
        a.running.data.settings = {
            **(a.running.data.settings or {}),
            "primary_conninfo": a.conninfo(b),
            "primary_slot_name": a.member_id,
        }
        a.start()
        stage.until(lambda: a.running.streams_from == "b" and a.running.timeline == 4)
        b.write(synchronous_standby_names="")
        stage.run(1)
        stage.commit(b, "after")
        stage.run(1)
        assert stage.rows(a) == ("before", "after")


def test_a_crashed_server_comes_back_with_what_it_had_written() -> None:
    with staged("a") as stage:
        (a,) = stage.instances
        stage.primary(a)
        for number in range(5):
            stage.commit(a, number)
        stage.run(0.1)
        a.running.crash_backend()
        stage.run(0.1)
        assert a.exits == ["crashed"]
        a.start()
        stage.until(lambda: a.running.ready)
        assert stage.rows(a) == (0, 1, 2, 3, 4)


def test_the_position_is_the_end_of_the_last_complete_record() -> None:
    with staged("a", "b") as stage:
        a, b = stage.instances
        stage.primary(a)
        stage.standby(b, a)
        stage.commit(a, "row")
        stage.run(1)
        end = stage.do(b, b.port.position(chain_of(), deadline_s=1))
        assert (end.timeline, end.lsn) == (1, a.end)
