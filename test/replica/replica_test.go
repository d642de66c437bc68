// Package replica tries `mantlet control-plane` as it is run: a process, a real API server, real agents and Envoys in network namespaces.
package replica

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mantlet/mantlet/sandbox/netns"
)

func TestMain(m *testing.M) { netns.TestMain(m) }

// TestControlPlane: sidecars that show nothing but their pods' tokens are enforced by policies written to the API, whatever is restarted.
func TestControlPlane(t *testing.T) {
	w := newWorld(t)
	plane := w.startControlPlane()
	db, api, other := w.addPod("db", "10.64.0.11"), w.addPod("api", "10.64.0.12"), w.addPod("other", "10.64.0.13")
	w.startAgents(agentsAt, db, api, other)
	w.want("no policy", api, db, netns.Connected)
	w.want("no policy", other, db, netns.Connected)

	w.apply(admit("db", "api"))
	w.await("the policy is in force", other, db, netns.Refused)
	w.want("the policy admits", api, db, netns.Connected)

	if err := w.server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.apply(admit("db", "other"))
	w.await("a policy written after the API server was restarted", api, db, netns.Refused)
	w.await("and whom it admits", other, db, netns.Connected)

	plane.stop()
	w.want("without a control plane", other, db, netns.Connected)
	w.want("without a control plane", api, db, netns.Refused)
	w.apply(admit("db", "api"))
	plane = w.startControlPlane()
	w.await("a policy written while there was none", other, db, netns.Refused)
	w.await("and whom it admits", api, db, netns.Connected)

	w.relabel(other, "api")
	w.await("a running pod with the labels of another", other, db, netns.Connected)
	w.deletePolicy("db")
	w.relabel(other, "other")
	w.await("no policy", other, db, netns.Connected)
	plane.stop()
	for _, line := range strings.Split(plane.log.String(), "\n") {
		if strings.Contains(line, "level=ERROR") || strings.Contains(line, "DATA RACE") {
			t.Errorf("the control plane says: %s", line)
		}
	}
}

// TestReplicas: sidecars of different replicas trust each other, and both replicas enforce what is written once.
func TestReplicas(t *testing.T) {
	w := newWorld(t)
	first, second := w.launch(agentsAt, healthAt), w.launch(secondAt, secondHealthAt)
	w.ready(first)
	w.ready(second)
	db, api, other := w.addPod("db", "10.64.0.11"), w.addPod("api", "10.64.0.12"), w.addPod("other", "10.64.0.13")
	w.startAgents(agentsAt, db)
	w.startAgents(secondAt, api, other)
	w.apply(admit("db", "api"))
	w.await("the policy is in force", other, db, netns.Refused)
	w.await("the policy admits an identity that the other replica signed", api, db, netns.Connected)
	first.stop()
	w.want("one replica has ended", api, db, netns.Connected)
	w.want("one replica has ended", other, db, netns.Refused)
	second.stop()
}

// TestReadiness: without an API server the process is alive and not ready, and ends when it is asked to.
func TestReadiness(t *testing.T) {
	w := newWorld(t)
	if err := w.server.Shutdown(); err != nil {
		t.Fatal(err)
	}
	plane := w.launch(agentsAt, healthAt)
	if code, _ := plane.get("/healthz"); code != 200 {
		t.Errorf("alive: %d", code)
	}
	if code, text := plane.get("/readyz"); code != 503 {
		t.Errorf("ready without an API server: %d, %s", code, text)
	}
	if err := w.server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.ready(plane)
	plane.stop()
}

// TestEnd: SIGTERM has a replica go on for its grace, not ready and with its sidecars until they are sent away, and a second one has it end at once.
func TestEnd(t *testing.T) {
	w := newWorld(t)
	first, second := w.launch(agentsAt, healthAt, "--grace", "1h"), w.launch(secondAt, secondHealthAt)
	w.ready(first)
	w.ready(second)
	db, api := w.addPod("db", "10.64.0.11"), w.addPod("api", "10.64.0.12")
	w.startAgents(agentsAt, db)
	w.startAgents(secondAt, api)
	w.must(first.cmd.Process.Signal(syscall.SIGTERM))
	if !until(t.Context(), func() bool { code, _ := first.get("/readyz"); return code == http.StatusServiceUnavailable }) {
		t.Fatalf("it does not say that it is not ready:\n%s", first.log)
	}
	w.apply(admit("db", "nobody"))
	w.await("a policy that is written then", api, db, netns.Refused)
	if code, out, errs := w.status([]*controlPlane{first, second}, "--wait", "shop/db", "--timeout", "30s"); code != 0 {
		t.Errorf("status of a policy in force in a sidecar whose replica is about to end: exit code %d\n%s%s", code, out, errs)
	}
	first.stopped = true
	w.must(first.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case <-first.ended:
	case <-time.After(patience):
		t.Fatal("it does not end at a second signal")
	}
	second.stop()
}

// BenchmarkWriteToACK measures from the write of a NetworkPolicy to the ACK of the sidecar that it is for, with programs as they are shipped. The
// write itself is in it, and so is a scrape of the metrics, by which the ACK is seen.
func BenchmarkWriteToACK(b *testing.B) {
	w := newWorld(b)
	plane := w.startControlPlane()
	db, api := w.addPod("db", "10.64.0.11"), w.addPod("api", "10.64.0.12")
	w.startAgents(agentsAt, db, api)
	var whole, writes []time.Duration
	acked, i := plane.acks("Verdicts"), 0
	for b.Loop() {
		began := time.Now()
		w.apply(admit("db", []string{"api", "nobody"}[i%2]))
		writes = append(writes, time.Since(began))
		for now := acked; now == acked; {
			if now = plane.acks("Verdicts"); now > acked {
				whole = append(whole, time.Since(began))
				acked = now
				break
			}
			if time.Since(began) > patience {
				b.Fatalf("edit %d is not confirmed", i)
			}
		}
		i++
	}
	for _, m := range []struct {
		took []time.Duration
		unit string
	}{{writes, "write-ms"}, {whole, "ms"}} {
		slices.Sort(m.took)
		b.ReportMetric(float64(m.took[len(m.took)/2].Microseconds())/1000, "median-"+m.unit)
		b.ReportMetric(float64(m.took[len(m.took)*99/100].Microseconds())/1000, "p99-"+m.unit)
	}
	plane.stop()
}

const patience = 60 * time.Second

// until looks again and again, as what others do has no event here.
func until(ctx context.Context, holds func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for !holds() {
		select {
		case <-ctx.Done():
			return false
		case <-look.C:
		}
	}
	return true
}
