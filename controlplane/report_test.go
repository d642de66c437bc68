package controlplane

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// named lets a client say who it is.
type named struct{}

func (named) Authenticate(ctx context.Context) (server.Client, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if names := md.Get("pod"); len(names) == 1 {
		return server.Client(names[0]), nil
	}
	return "", errors.New("who is it?")
}

// simulated is a sidecar that asks for all that a sidecar asks for, and confirms it, or refuses one type.
func simulated(t *testing.T, conn *grpc.ClientConn, pod, refuses string) (leave func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "pod", pod))
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for url, list := range map[string][]string{
		server.ListenerType: nil, server.ClusterType: nil, server.ExtensionType: {names.RBAC},
		names.TypeVerdicts: {names.Verdicts}, names.TypePackets: {names.Packets}, names.TypeNetwork: {names.Network},
	} {
		if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: list}); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			answer := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
			if r.TypeUrl == refuses {
				answer.ErrorDetail = &rpcstatus.Status{Code: 3, Message: "no room in the kernel"}
			}
			if stream.Send(answer) != nil {
				return
			}
		}
	}()
	leave = func() { cancel(); <-done }
	t.Cleanup(leave)
	return leave
}

// TestReport: what sidecars confirm, refuse and leave unanswered is told of the policies that select them.
func TestReport(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	cp, err := New(Config{Policy: policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"),
		PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}}, server.Config{Authenticator: named{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cp.Close)
	w := &town{cp, t, 0}
	if err := cp.Load(&policy.Objects{}); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "xds"))
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(server.ServerOptions()...)
	cp.Server().Register(g)
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })

	np := func(generation int64) *networkingv1.NetworkPolicy {
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db", UID: "p1", Generation: generation},
			Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}}}
		if generation > 1 { // it admits somebody
			p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
				{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "api"}}}}}}
		}
		return p
	}
	required := func() bool {
		return slices.Contains(cp.Report().Namespaces, status.Namespace{Name: "shop", Mode: "permissive", Required: true})
	}
	w.apply(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{policy.InjectLabel: "required"}}})
	w.apply(np(1))
	if !required() {
		t.Errorf("the namespace's label is not told: %+v", cp.Report().Namespaces)
	}
	w.apply(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{policy.InjectLabel: "enabled"}}})
	if required() {
		t.Error("the namespace is said to require sidecars still")
	}
	well, refusing, away := w.scale("db"), w.scale("db"), w.scale("db")
	api := w.scale("api")
	bare := w.pod("db")
	bare.Annotations = nil
	w.apply(bare)
	leave := simulated(t, conn, well, "")
	simulated(t, conn, api, "")
	simulated(t, conn, refusing, names.TypePackets)
	await := func(what string, ok func(status.PolicyStatus, status.Status) bool) status.PolicyStatus {
		t.Helper()
		var p status.PolicyStatus
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) { //nolint:forbidigo // the ledger tells nobody of several
			s := status.Merge([]status.Report{cp.Report()}, nil)
			if p, _ = s.Policy("shop/db"); ok(p, s) {
				return p
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %s", what, p.Summary())
			}
		}
	}
	sum := "1 of 4 in force; 1 refused it: no room in the kernel (shop/db-2); 1 pod is not connected (shop/db-3); 1 pod has no sidecar (shop/db-5)"
	p := await("confirmed, refused, away and bare", func(p status.PolicyStatus, _ status.Status) bool { return p.Summary() == sum })
	if p.State != status.Refused || p.Generation != 1 || p.UID != "p1" {
		t.Errorf("policy: %+v", p)
	}
	// Between the change and its ACK the policy is in force nowhere: what is wanted has changed with the policy, not later.
	w.apply(np(2))
	if r := cp.Report(); r.Policies[0].Generation != 2 || slices.ContainsFunc(r.Pods, func(p status.Pod) bool {
		return p.Name == well && p.Sidecar.InForce && p.Sidecar.LastAck.Before(r.Time.Add(-10*time.Second))
	}) {
		t.Errorf("after the change: %+v", r.Policies)
	}
	await("the change", func(p status.PolicyStatus, _ status.Status) bool { return p.Generation == 2 && p.Summary() == sum })
	leave()
	await("one that has left", func(p status.PolicyStatus, _ status.Status) bool {
		return p.InForce == 0 && slices.Equal(p.Elsewhere[status.NotConnected], []string{well, away})
	})
	simulated(t, conn, well, "")
	simulated(t, conn, away, "")
	await("both are here", func(p status.PolicyStatus, s status.Status) bool {
		return p.InForce == 2 && s.State == status.NotEverywhere
	})
	if err := cp.Delete(bare); err != nil {
		t.Fatal(err)
	}
	if err := cp.Delete(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: strings.TrimPrefix(refusing, "shop/")}}); err != nil {
		t.Fatal(err)
	}
	await("everybody", func(p status.PolicyStatus, s status.Status) bool {
		return p.InForce == 2 && p.State == status.InForce && s.State == status.InForce
	})
}
