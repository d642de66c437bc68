package replica

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mantlet/mantlet/controlplane/authority"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/rotation"
	"github.com/mantlet/mantlet/controlplane/status/ask"
)

// rotation is one with these replicas, by whoever comes.
func (w *world) rotation(replicas ...*running) rotation.Rotation {
	var servers []string
	for _, r := range replicas {
		servers = append(servers, r.status)
	}
	return rotation.Rotation{
		Secret:   authority.Secret{Client: w.client, Name: types.NamespacedName{Namespace: names.SystemNamespace, Name: names.CASecret}},
		Replicas: ask.Source{Servers: servers},
	}
}

func (w *world) look(r rotation.Rotation) rotation.Position {
	w.t.Helper()
	p, err := r.Look(w.t.Context())
	w.must(err)
	return p
}

// trusting has sidecars verify each other all the time, and returns what ends that.
func (w *world) trusting(list ...*sidecar) (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var g sync.WaitGroup
	n := 0
	g.Go(func() {
		for ctx.Err() == nil {
			for _, a := range list {
				for _, b := range list {
					is, err := a.source.GetX509SVID()
					if err == nil {
						_, _, err = x509svid.Verify(is.Certificates, b.source)
					}
					if err != nil {
						w.t.Errorf("%s refuses %s: %v", b.pod.Name, a.pod.Name, err)
						return
					}
					n++
				}
			}
		}
	})
	return func() {
		cancel()
		g.Wait()
		w.t.Logf("verified %d times", n)
	}
}

// TestRotation: a root is replaced by steps that whoever comes takes, none of which is taken while a replica or a sidecar is behind; nobody refuses anybody
// meanwhile, with a replica that goes and one that comes.
func TestRotation(t *testing.T) {
	w := newWorld(t)
	one, two := w.start(), w.start()
	quick := w.run(w.pod("quick", "db", "10.64.0.11"), one, time.Second)
	other := w.run(w.pod("other", "db", "10.64.0.12"), two, time.Second)
	slow := w.run(w.pod("slow", "db", "10.64.0.13"), two, 0) // renews when it is asked to
	pending := w.pod("pending", "db", "10.64.0.14")
	pending.Status.PodIP, pending.Status.PodIPs = "", nil
	_, err := w.client.CoreV1().Pods("shop").UpdateStatus(t.Context(), pending, metav1.UpdateOptions{})
	w.must(err)
	stop := w.trusting(quick, other, slow)
	first := slow.svid()
	r := w.rotation(one, two)
	w.until("all are as they should be", func() bool { return w.look(r).Complete() })

	if err := r.Advance(t.Context(), w.look(r)); err != nil { // by one who is killed
		t.Fatal(err)
	}
	step := func(of authority.Step) {
		t.Helper()
		r := w.rotation(one, two)
		var p rotation.Position
		w.until("all replicas have taken the step over, and who renews has it", func() bool {
			p = w.look(r)
			return p.Waits == "" && slices.Equal(p.Behind, []string{"shop/slow"})
		})
		if p.Step != of || p.Complete() {
			t.Fatalf("it is %+v, not at %q", p, of)
		}
		if err := r.Advance(t.Context(), p); !errors.Is(err, rotation.ErrWaits) || !strings.Contains(err.Error(), "1 sidecar may not have that yet (shop/slow)") {
			t.Fatalf("with a sidecar behind: %v", err)
		}
		slow.source.Renew()
		w.until("the last has it", func() bool { p = w.look(r); return p.Waits == "" && len(p.Behind) == 0 })
		paused := r
		paused.Pause = time.Hour
		if err := paused.Advance(t.Context(), p); !errors.Is(err, rotation.ErrWaits) || !strings.Contains(err.Error(), "1h0m0s after") {
			t.Errorf("before the pause is over: %v", err)
		}
		// Two at once.
		var g sync.WaitGroup
		errs := make([]error, 2)
		again := w.look(r)
		for i, at := range []rotation.Position{p, again} {
			g.Go(func() { errs[i] = r.Advance(t.Context(), at) })
		}
		g.Wait()
		if (errs[0] == nil) == (errs[1] == nil) || !errors.Is(errors.Join(errs...), authority.ErrMoved) || !errors.Is(errors.Join(errs...), rotation.ErrWaits) {
			t.Fatalf("of two at once not exactly one goes on: %v", errs)
		}
	}
	step(authority.Prepared)

	// A replica ends, and another comes: what the sidecars were given by the one before nobody knows then.
	two.stop()
	if p := w.look(w.rotation(one, two)); !strings.Contains(p.Waits, "is not heard") {
		t.Errorf("a replica is gone, and nothing is waited for: %+v", p)
	}
	two = w.start()
	other.move(two)
	slow.move(two)
	if bundle, err := slow.source.GetX509BundleForTrustDomain(td); err != nil || len(bundle.X509Authorities()) != 2 {
		t.Errorf("the sidecar trusts %d roots, %v", len(bundle.X509Authorities()), err)
	}
	step(authority.Activated)
	last := w.rotation(one, two)
	w.until("all but one have the new root alone", func() bool {
		p := w.look(last)
		return p.Step == authority.Settled && p.Waits == "" && slices.Equal(p.Behind, []string{"shop/slow"})
	})
	slow.source.Renew()
	w.until("all have", func() bool { return w.look(last).Complete() })
	stop()
	bundle, err := slow.source.GetX509BundleForTrustDomain(td)
	w.must(err)
	if _, _, err := x509svid.Verify(first.Certificates, bundle); len(bundle.X509Authorities()) != 1 || err == nil {
		t.Errorf("%d roots are trusted, and what the old one signed: %v", len(bundle.X509Authorities()), err)
	}
	secret, err := w.client.CoreV1().Secrets(names.SystemNamespace).Get(t.Context(), names.CASecret, metav1.GetOptions{})
	w.must(err)
	if len(secret.Data) != 3 {
		t.Errorf("%d keys are left in the secret", len(secret.Data))
	}
	for _, of := range []*running{one, two} {
		if strings.Contains(of.log.String(), "level=ERROR") {
			t.Errorf("a replica says:\n%s", of.log)
		}
	}
}

// TestRotateCommand: `mantlet ca rotate --wait` goes through all of it, killed in between, and its exit codes tell.
func TestRotateCommand(t *testing.T) {
	w := newWorld(t)
	binary := filepath.Join(t.TempDir(), "mantlet")
	build := exec.CommandContext(t.Context(), "go", "build", "-race", "-o", binary, "./cmd/mantlet")
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	one, two := w.start(), w.start()
	a := w.run(w.pod("a", "db", "10.64.0.11"), one, time.Second)
	b := w.run(w.pod("b", "db", "10.64.0.12"), two, time.Second)
	ca := func(args ...string) *exec.Cmd {
		return exec.CommandContext(t.Context(), binary, append([]string{"ca"}, append(args, "--kubeconfig", w.config, "--server", one.status, "--server", two.status)...)...)
	}
	run := func(want int, says string, args ...string) {
		t.Helper()
		cmd := ca(args...)
		out, err := cmd.CombinedOutput()
		t.Logf("ca %s\n%s", strings.Join(args, " "), out)
		if code := cmd.ProcessState.ExitCode(); code != want || !strings.Contains(string(out), says) {
			t.Errorf("ca %s: exit code %d, not %d with %q: %v", strings.Join(args, " "), code, want, says, err)
		}
	}
	root := func() *x509.Certificate {
		bundle, err := a.source.GetX509BundleForTrustDomain(td)
		w.must(err)
		return bundle.X509Authorities()[0]
	}
	before := root()
	w.until("all are as they should be", func() bool { return w.look(w.rotation(one, two)).Complete() })
	run(0, "no rotation is under way: all sidecars have that", "status")
	stop := w.trusting(a, b)
	run(1, "step 1 of 3, the old root signs and both are trusted", "rotate", "--pause", "1h")
	run(1, "step 1 of 3, the old root signs and both are trusted", "status")
	run(1, `"step": "prepared"`, "status", "-o", "json")
	run(1, "run it again, and it goes on from there", "rotate", "--wait", "--pause", "1h", "--timeout", "3s")
	killed := ca("rotate", "--wait", "--pause", "1s")
	w.must(killed.Start())
	w.until("the second step", func() bool { return w.look(w.rotation(one, two)).Step == authority.Activated })
	w.must(killed.Process.Kill())
	_ = killed.Wait() // was killed
	run(0, "the rotation is complete: every sidecar trusts the new root alone", "rotate", "--wait", "--pause", "1s", "--timeout", "1m")
	if root().Equal(before) {
		t.Error("the root is the one before")
	}
	// Once more, without --wait: each time as far as it goes.
	with := func() bool { p := w.look(w.rotation(one, two)); return p.Waits == "" && len(p.Behind) == 0 }
	for i, want := range []int{1, 1, 0} {
		run(want, fmt.Sprintf("step %d of 3 is written", i+1), "rotate", "--pause", "0s")
		w.until("the step is with all", with)
	}
	stop()
	run(0, "no rotation is under way: all sidecars have that", "status")
	run(2, "hint: table or json", "status", "-o", "xml")
	two.stop()
	run(1, "is not heard", "status")
	one.stop()
	run(2, "no replica answers", "rotate")
}
