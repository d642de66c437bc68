package replica

import (
	"net/netip"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/status"
)

// TestRetired: what a running pod no longer is, is refused from its address by whoever served when it was relabelled, by replicas that start later,
// when all that saw it are gone, and where nobody saw it at all; a twin notices nothing.
func TestRetired(t *testing.T) {
	w := newWorld(t)
	one := w.start()
	w.admit("db", "api")
	db := w.run(w.pod("db", "db", "10.64.0.11"), one, 0)
	api := w.run(w.pod("api", "api", "10.64.0.12"), one, 0)
	twin := w.run(w.pod("twin", "api", "10.64.0.13"), one, 0)
	late := w.run(w.pod("late", "api", "10.64.0.14"), one, 0)
	was := api.svid().ID
	w.until("the policy is in force", func() bool {
		return db.admits(one, was, api.addr) && db.admits(one, was, late.addr) && !db.admits(one, db.svid().ID, api.addr)
	})

	w.relabel("api", "other")
	w.until("who saw it refuses the old identity", func() bool { return !db.admits(one, was, api.addr) })
	if !db.admits(one, was, twin.addr) {
		t.Error("a twin is refused")
	}
	api.source.Renew()
	w.until("the pod is given its new identity", func() bool { return api.svid().ID != was })
	// From then on it is on record.
	secret, err := w.client.CoreV1().Secrets(names.SystemNamespace).Get(t.Context(), names.RetiredSecret, metav1.GetOptions{})
	if err != nil || !strings.Contains(string(secret.Data[string(api.pod.UID)]), was.String()) {
		t.Fatalf("the pod has another certificate, and no record says that it no longer has the one before: %v %s", err, secret.Data)
	}

	refuses := func(who *running) {
		t.Helper()
		db.move(who)
		if db.admits(who, was, api.addr) {
			t.Error("the old identity is let in again")
		}
		if !db.admits(who, was, twin.addr) {
			t.Error("a twin is refused")
		}
		if n := w.report(who).Retired; n.Identities == 0 || n.Problem != "" || len(n.Bindings) > 0 {
			t.Errorf("the replica reports %+v", n)
		}
	}
	two := w.start() // which has never seen the pod as anything else
	refuses(two)
	one.stop()
	two.stop()

	w.relabel("late", "other") // while nobody is there
	three := w.start()
	refuses(three)
	for _, s := range []*sidecar{api, twin, late} {
		s.move(three)
	}
	w.until("who shows its old certificate is refused by it, and given another", func() bool { return !db.admits(three, was, late.addr) && late.svid().ID != was })
	if !db.admits(three, was, twin.addr) {
		t.Error("a twin is refused")
	}
	three.stop()
	four := w.start()
	refuses(four)
	if db.admits(four, was, late.addr) {
		t.Error("what was shown is forgotten")
	}
	four.stop()
	for _, r := range []*running{one, two, three, four} {
		if strings.Contains(r.log.String(), "level=ERROR") {
			t.Errorf("a replica says:\n%s", r.log)
		}
	}
}

// TestRetiredBroken: what cannot be read has identities count from their pods' addresses only, and is told.
func TestRetiredBroken(t *testing.T) {
	w := newWorld(t)
	one := w.start()
	w.admit("db", "api")
	db := w.run(w.pod("db", "db", "10.64.0.11"), one, 0)
	api := w.run(w.pod("api", "api", "10.64.0.12"), one, 0)
	was := api.svid().ID
	w.until("the policy is in force", func() bool { return db.admits(one, was, api.addr) && !db.admits(one, db.svid().ID, api.addr) })
	w.relabel("api", "other")
	api.source.Renew()
	w.until("it is on record", func() bool { return api.svid().ID != was })
	one.stop()

	secrets := w.client.CoreV1().Secrets(names.SystemNamespace)
	is, err := secrets.Get(t.Context(), names.RetiredSecret, metav1.GetOptions{})
	w.must(err)
	is.Data[string(api.pod.UID)] = []byte("{")
	_, err = secrets.Update(t.Context(), is, metav1.UpdateOptions{})
	w.must(err)
	w.pod("twin", "api", "10.64.0.13")
	two := w.start()
	db.move(two)
	if db.admits(two, was, api.addr) {
		t.Error("the old identity is let in again: its record is broken")
	}
	first, second := netip.MustParseAddr("10.64.0.13"), netip.MustParseAddr("10.64.0.14")
	if !db.admits(two, was, first) || db.admits(two, was, second) {
		t.Error("identities do not count from exactly their pods' addresses")
	}
	w.pod("twin-2", "api", "10.64.0.14")
	w.until("another twin is told of", func() bool { return db.admits(two, was, second) })
	r := w.report(two)
	if b := r.Retired.Bindings; len(b) != 1 || b[0].Namespace != "" || !strings.Contains(r.Retired.Problem, "was broken and is mended: key "+string(api.pod.UID)) {
		t.Errorf("the replica reports %+v", r.Retired)
	}
	var table strings.Builder
	w.must(status.Merge([]status.Report{r}, nil).Table(&table, status.Exceptions, r.Time))
	if !strings.Contains(table.String(), "identities of all namespaces count from addresses of pods that have them only; that ends in") {
		t.Errorf("status says nothing of it:\n%s", table.String())
	}
	if !strings.Contains(two.log.String(), `level=ERROR msg="what is on record of retired identities is broken`) {
		t.Errorf("the log says nothing of it:\n%s", two.log)
	}
}

// TestRetiredUnrecorded: a pod whose old identity cannot be put on record is refused under it all the same, and is given no other certificate until it is.
func TestRetiredUnrecorded(t *testing.T) {
	w := newWorld(t)
	one := w.start()
	w.admit("db", "api")
	db := w.run(w.pod("db", "db", "10.64.0.11"), one, 0)
	first := w.run(w.pod("first", "api", "10.64.0.12"), one, 0)
	api := w.run(w.pod("api", "api", "10.64.0.13"), one, 0)
	was := api.svid().ID
	w.until("the policy is in force", func() bool { return db.admits(one, was, api.addr) && !db.admits(one, db.svid().ID, api.addr) })
	w.relabel("first", "other") // so that there is a record
	first.source.Renew()
	w.until("it is on record", func() bool { return first.svid().ID != was })
	secrets := w.client.CoreV1().Secrets(names.SystemNamespace)
	is, err := secrets.Get(t.Context(), names.RetiredSecret, metav1.GetOptions{})
	w.must(err)
	is.Immutable = new(true)
	_, err = secrets.Update(t.Context(), is, metav1.UpdateOptions{})
	w.must(err)

	w.relabel("api", "other")
	w.until("the old identity is refused", func() bool { return !db.admits(one, was, api.addr) })
	serial := api.svid().Certificates[0].SerialNumber
	api.source.Renew()
	w.until("the replica says that it cannot", func() bool {
		return strings.Contains(w.report(one).Retired.Problem, "cannot be put on record: secret mantlet-system/mantlet-retired")
	})
	w.until("it has signed nothing", func() bool {
		return strings.Contains(one.log.String(), `msg="no identity signed" pod=shop/api`) && strings.Contains(one.log.String(), "is not on record")
	})
	if now := api.svid(); now.ID != was || now.Certificates[0].SerialNumber.Cmp(serial) != 0 {
		t.Errorf("the pod is given a certificate of %s", now.ID)
	}
	w.must(secrets.Delete(t.Context(), names.RetiredSecret, metav1.DeleteOptions{}))
	w.until("the pod is given its new identity", func() bool { return api.svid().ID != was })
	if r := w.report(one).Retired; r.Problem != "" || r.Identities != 2 {
		t.Errorf("the replica reports %+v", r)
	}
}
