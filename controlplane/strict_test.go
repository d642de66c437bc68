package controlplane

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/server"
)

// strictTown has n pods of as many workloads on four nodes, strict and isolated by no policy: each hears all of them over UDP, and nobody else.
func strictTown(t *testing.T, n int) *town {
	t.Helper()
	cp, err := New(Config{Policy: policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"),
		PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}, DefaultMode: verdict.Strict}}, server.Config{Authenticator: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	w := &town{cp, t, 0}
	o := &policy.Objects{}
	for i := range n {
		o.Pods = append(o.Pods, w.strict(i))
	}
	if err := cp.Load(o); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *town) strict(i int) *corev1.Pod {
	p := w.pod(fmt.Sprint("app-", i))
	p.Status.HostIPs = []corev1.HostIP{{IP: fmt.Sprint("192.0.2.", 1+i%4)}}
	return p
}

// TestStrictPodsShareTheirList has one pod come to many that each list all of them. What is done for that grows with the pods, and not with their
// square: the list is made once, and written down once for each node.
func TestStrictPodsShareTheirList(t *testing.T) {
	for _, n := range []int{100, 400} {
		w := strictTown(t, n)
		before := w.index.Addressed()
		versions := w.published()
		if err := w.Update([]metav1.Object{w.strict(n)}, nil); err != nil {
			t.Fatal(err)
		}
		if looked := w.index.Addressed() - before; looked > 2*n {
			t.Errorf("%d pods: %d addresses were looked at for one more", n, looked)
		}
		resources := map[*server.Resource]bool{}
		pods := 0
		for _, nodes := range w.packets {
			for _, is := range nodes {
				pods++
				resources[is.resource] = true
			}
		}
		if pods != n+1 || len(resources) != 4 {
			t.Errorf("%d pods on 4 nodes are sent %d resources", pods, len(resources))
		}
		for name, version := range w.published() {
			if version == versions[name] {
				t.Errorf("%s has not heard of the new pod", name)
			}
		}
	}
}
