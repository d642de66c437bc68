package server_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mantlet/mantlet/xds/server"
)

func TestAReconnectConfirmsOnlyWhatTheClientSays(t *testing.T) {
	b := start(t, nil)
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	unconfirmed := func(what string) {
		t.Helper()
		if err := b.Ledger().Wait(ended, "ns/a"); !errors.Is(err, server.ErrNotConfirmed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	b.Publish("ns/a", set(t, lds(t, "in", "1"), lds(t, "old", "1")))
	s := b.connect(t, "ns/a")
	s.ask("lds")
	held := holds(s.gets("lds +in +old"))
	s.silent()
	s.cancel()

	s = b.connect(t, "ns/a")
	s.silent()
	unconfirmed("nothing said yet")
	s.ask("lds")
	r := s.wants("lds +in +old")
	if b.Ledger().InForce("ns/a", lds(t, "in", "1")) {
		t.Error("in force in an Envoy that holds nothing")
	}
	s.ack(r)
	s.silent()
	b.Publish("ns/a", set(t, lds(t, "in", "1")))
	s.wants("lds -old") // and no ACK
	s.cancel()

	s = b.connect(t, "ns/a")
	s.silent()
	unconfirmed("a removal on the last connection was never acknowledged")
	s.resume("lds", held)
	r = s.wants("lds -old")
	if !b.Ledger().InForce("ns/a", lds(t, "in", "1")) {
		t.Error("not in force though the client holds it")
	}
	unconfirmed("removal on its way")
	s.ack(r)
	s.silent()
	if err := b.Ledger().Wait(ended, "ns/a"); err != nil {
		t.Error(err)
	}

	b.Publish("ns/a", server.Set{})
	s.wants("lds -in")
	s.cancel()
	away(t, b, "ns/a")
	s = b.connect(t, "ns/a")
	s.silent()
	unconfirmed("nothing but a removal that was never acknowledged")
	s.ask("lds")
	s.gets("lds") // it does not hold it any more
	s.silent()
	if err := b.Ledger().Wait(ended, "ns/a"); err != nil {
		t.Error(err)
	}
}

// away waits until the server has seen the end of a client's stream.
func away(t *testing.T, b *bench, client server.Client) {
	t.Helper()
	await(t, "the server sees the end of the stream", func() bool { cs, _ := b.Ledger().Status(client); return !cs.Connected })
}

func TestUnsubscribedIsNotInForce(t *testing.T) {
	b := start(t, nil)
	rbac := ecds(t, "rbac", "1")
	b.Publish("ns/a", set(t, rbac, lds(t, "in", "1")))
	s := b.connect(t, "ns/a")
	s.ask("ecds", "rbac")
	s.gets("ecds +rbac")
	s.ask("lds")
	s.gets("lds +in")
	s.ask("ecds", "-rbac")
	s.ask("lds", "-*")
	s.silent()
	if got, want := b.status("ns/a"), "lds in not subscribed; ecds rbac not subscribed"; got != want && got != "ecds rbac not subscribed; lds in not subscribed" {
		t.Errorf("got %q, want %q", got, want)
	}
	if b.Ledger().InForce("ns/a", rbac) {
		t.Error("in force though the client dropped it")
	}
}

// What changes while OnDemand is being asked is not lost, and is not answered before it was asked for.
func TestChangesWhileResolving(t *testing.T) {
	b := start(t, nil)
	b.od.set("od|a", cds(t, "od|a", "1"))
	b.od.set("od|b", cds(t, "od|b", "1"))
	b.Publish("ns/a", server.Set{})
	s := b.connect(t, "ns/a")

	release := b.od.block()
	s.ask("cds", "od|a")
	<-b.od.blocked
	b.od.set("od|a", cds(t, "od|a", "2"))
	b.Refresh("ns/a", "od|a")
	s.ask("cds", "od|b")
	await(t, "od|b subscribed", func() bool { return len(b.Subscribers("od|b")) == 1 })
	close(release)
	held := map[string]string{}
	for len(held) < 2 || held["od|a"] != cds(t, "od|a", "2").Version {
		r := s.next()
		if len(r.RemovedResources) > 0 {
			t.Errorf("answered as unknown before it was asked for: %v", r.RemovedResources)
		}
		for _, x := range r.Resources {
			held[x.Name] = x.Version
		}
		s.ack(r)
	}
	s.silent()

	// An ACK that arrives while the answer is being made does not confirm what is not made yet.
	b.od.set("od|a", cds(t, "od|a", "3"))
	b.Refresh("ns/a", "od|a")
	r := s.wants("cds +od|a")
	release = b.od.block()
	b.od.set("od|a", cds(t, "od|a", "4"))
	b.Refresh("ns/a", "od|a")
	<-b.od.blocked
	s.ack(r)
	await(t, "ACK arrived", func() bool { return b.Ledger().InForce("ns/a", cds(t, "od|a", "3")) })
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.Ledger().Wait(ended, "ns/a"); !errors.Is(err, server.ErrNotConfirmed) {
		t.Errorf("confirmed before it was resolved: %v", err)
	}
	close(release)
	s.gets("cds +od|a")
}

func TestChangesAreCoalescedWhileOneIsOnItsWay(t *testing.T) {
	b := start(t, func(c *server.Config) { c.AckPatience = time.Hour })
	b.Publish("ns/a", set(t, lds(t, "in", "0"), lds(t, "out", "0")))
	s := b.connect(t, "ns/a")
	s.ask("lds")
	first := s.wants("lds +in +out")
	for i := range 100 {
		b.Publish("ns/a", set(t, lds(t, "in", fmt.Sprint(i+1)), lds(t, "out", "0"), lds(t, "new", "0")))
	}
	s.gets("lds +new") // a resource waits for its own ACK only
	s.silent()
	s.ack(first)
	if r := s.gets("lds +in"); r.Resources[0].Version != lds(t, "in", "100").Version {
		t.Error("not the last version was sent")
	}
	s.silent()
}

func TestPatienceWithAClientThatDoesNotAck(t *testing.T) {
	b := start(t, func(c *server.Config) { c.AckPatience = 50 * time.Millisecond })
	b.Publish("ns/a", set(t, lds(t, "in", "1")))
	s := b.connect(t, "ns/a")
	s.ask("lds")
	first := s.wants("lds +in")
	b.Publish("ns/a", set(t, lds(t, "in", "2")))
	second := s.wants("lds +in")
	s.ack(first) // late, and of an older version
	s.silent()
	if got := b.status("ns/a"); got != "lds in pending" {
		t.Errorf("after the ACK of an older version: %q", got)
	}
	s.ack(second)
	s.silent()
	if got := b.status("ns/a"); got != "lds in in force" {
		t.Errorf("after the ACK: %q", got)
	}
}

func TestWait(t *testing.T) {
	b := start(t, nil)
	l := b.Ledger()
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := l.Wait(ended, "ns/a"); !errors.Is(err, server.ErrNotPublished) {
		t.Errorf("nothing published: %v", err)
	}
	b.Publish("ns/a", set(t, lds(t, "in", "1"), ecds(t, "rbac", "1")))
	if err := l.Wait(ended, "ns/a"); !errors.Is(err, server.ErrNotConnected) || !errors.Is(err, context.Canceled) {
		t.Errorf("not connected: %v", err)
	}
	waits := func() chan error {
		done := make(chan error, 1)
		ctx := within(t, 15*time.Second)
		go func() { done <- l.Wait(ctx, "ns/a") }()
		return done
	}
	done := waits()
	s := b.connect(t, "ns/a")
	s.ask("lds")
	s.gets("lds +in")
	s.silent()
	if err := l.Wait(ended, "ns/a"); !errors.Is(err, server.ErrNotConfirmed) || !strings.Contains(err.Error(), `TypedExtensionConfig "rbac" not subscribed to`) {
		t.Errorf("not subscribed: %v", err)
	}
	s.ask("ecds", "rbac")
	r := s.wants("ecds +rbac")
	if err := l.Wait(ended, "ns/a"); !errors.Is(err, server.ErrNotConfirmed) || !strings.Contains(err.Error(), `"rbac" not acknowledged`) {
		t.Errorf("not acknowledged: %v", err)
	}
	s.ack(r)
	if err := <-done; err != nil {
		t.Errorf("all acknowledged: %v", err)
	}

	b.Publish("ns/a", set(t, ecds(t, "rbac", "1"))) // a removal is waited for, too
	done = waits()
	r = s.wants("lds -in")
	select {
	case err := <-done:
		t.Errorf("did not wait for the removal: %v", err)
	default:
	}
	s.ack(r)
	if err := <-done; err != nil {
		t.Errorf("removal acknowledged: %v", err)
	}

	b.Publish("ns/a", set(t, ecds(t, "rbac", "2")))
	done = waits()
	s.nack(s.wants("ecds +rbac"), "because")
	var refused *server.RefusedError
	if err := <-done; !errors.As(err, &refused) || refused.Name != "rbac" || refused.Refusal.Reason != "because" {
		t.Errorf("refused: %v", err)
	}
	if err := l.Wait(within(t, 15*time.Second), "ns/a"); !errors.As(err, &refused) {
		t.Errorf("refused before the call: %v", err)
	}

	b.Publish("ns/a", set(t, ecds(t, "rbac", "3")))
	r = s.wants("ecds +rbac")
	done = waits()
	await(t, "Wait is under way", func() bool { return b.Ledger().Waiting("ns/a") })
	b.Publish("ns/a", set(t, ecds(t, "rbac", "4")))
	s.ack(r) // what was published at the time of the call is enough
	if err := <-done; err != nil {
		t.Errorf("confirmed, and superseded meanwhile: %v", err)
	}
	b.Publish("ns/a", set(t, ecds(t, "rbac", "5"))) // 4 is on its way or was never sent
	done = waits()
	for {
		r := s.next()
		s.ack(r)
		if r.Resources[0].Version == ecds(t, "rbac", "5").Version {
			break
		}
	}
	if err := <-done; err != nil {
		t.Errorf("superseded: %v", err)
	}
	s.cancel()
	away(t, b, "ns/a")
	done = waits()
	b.Forget("ns/a")
	if err := <-done; !errors.Is(err, server.ErrForgotten) && !errors.Is(err, server.ErrNotPublished) {
		t.Errorf("forgotten: %v", err)
	}
}

func TestWaitForOnDemand(t *testing.T) {
	b := start(t, nil)
	b.od.set("od|a", cds(t, "od|a", "1"))
	b.Publish("ns/a", server.Set{})
	s := b.connect(t, "ns/a")
	s.ask("cds", "od|a", "od|b")
	s.gets("cds +od|a")
	s.gets("cds -od|b")
	l := b.Ledger()
	if err := l.Wait(within(t, 15*time.Second), "ns/a"); err != nil {
		t.Error(err)
	}
	b.Refresh("ns/a", "od|a", "od|b") // nothing changed: confirmed without a word
	if err := l.Wait(within(t, 15*time.Second), "ns/a"); err != nil {
		t.Error(err)
	}
	b.od.set("od|a", cds(t, "od|a", "2"))
	b.Refresh("ns/a", "od|a")
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := l.Wait(ended, "ns/a"); !errors.Is(err, server.ErrNotConfirmed) {
		t.Errorf("refreshed and not acknowledged: %v", err)
	}
	s.gets("cds +od|a")
	if err := l.Wait(within(t, 15*time.Second), "ns/a"); err != nil {
		t.Error(err)
	}
	s.cancel()
	away(t, b, "ns/a")
	if got := b.status("ns/a"); got != "" {
		t.Errorf("on-demand names outlive the stream that asked for them: %s", got)
	}
}

func TestEventsCountersAndSnapshot(t *testing.T) {
	var mu sync.Mutex
	var events []string
	now := time.Unix(1000, 0)
	b := start(t, func(c *server.Config) {
		c.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); now = now.Add(time.Second); return now }
		c.AckPatience = time.Hour
		c.OnEvent = func(e server.Event) {
			mu.Lock()
			defer mu.Unlock()
			kind := map[server.EventKind]string{server.Sent: "sent", server.Acked: "acked", server.Nacked: "nacked"}[e.Kind]
			if e.Published.After(e.Sent) || e.Sent.After(e.At) || e.Published.IsZero() {
				t.Errorf("times out of order: %+v", e)
			}
			events = append(events, fmt.Sprintf("%s %s %s %s", e.Client, kind, e.Name, e.Reason))
		}
	})
	b.Publish("ns/b", set(t, lds(t, "in", "1")))
	b.Publish("ns/a", set(t, lds(t, "in", "1")))
	s := b.connect(t, "ns/a")
	s.ask("lds")
	r := s.gets("lds +in")
	s.silent()
	b.Publish("ns/a", set(t, lds(t, "in", "2")))
	s.nack(s.wants("lds +in"), "why")
	s.silent()
	b.Publish("ns/a", server.Set{})
	s.gets("lds -in")
	s.silent()
	mu.Lock()
	got := strings.Join(events, "\n")
	mu.Unlock()
	if want := "ns/a sent in \nns/a acked in \nns/a sent in \nns/a nacked in why\nns/a sent in \nns/a acked in "; got != want {
		t.Errorf("events:\n%s\nwant:\n%s", got, want)
	}
	all := b.Ledger().Snapshot()
	if len(all) != 2 || all[0].Client != "ns/a" || !all[0].InForce || !all[0].Connected || all[1].Connected || all[1].InForce {
		t.Errorf("snapshot: %+v", all)
	}
	counted := all[0].Counters[server.ListenerType]
	if counted.Bytes < uint64(len(r.Resources[0].Resource.Value)) {
		t.Errorf("bytes: %d", counted.Bytes)
	}
	counted.Bytes = 0
	if want := (server.Counters{Responses: 3, Resources: 2, Removals: 1, Acks: 2, Nacks: 1}); counted != want {
		t.Errorf("counters: %+v, want %+v", counted, want)
	}
	b.Forget("ns/a")
	total := b.Ledger().Totals()[server.ListenerType]
	if total.Responses != 3 || total.Acks != 2 || total.Nacks != 1 {
		t.Errorf("totals: %+v", total)
	}
}
