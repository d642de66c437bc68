package e2e

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	corexds "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	setfilterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	networkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// published is what a control plane publishes for one pod, to be spoilt piece by piece.
type published struct {
	inbound, gate, outbound *listenerv3.Listener
	rbac                    *corev3.TypedExtensionConfig
	verdicts                *mantletv1.Verdicts
	network                 *mantletv1.Network
	packets                 *mantletv1.Packets
}

// publishedFor makes what the control plane made for a pod.
func publishedFor(t *testing.T, m *source.Manifests, name string) published {
	t.Helper()
	index := policy.NewIndex(policy.Config{TrustDomain: trustDomain, PodNetwork: m.PodNetwork, ServiceNetwork: m.ServiceNetwork})
	if err := index.ApplyAll(&m.Objects); err != nil {
		t.Fatal(err)
	}
	p, ok := index.Pod(name)
	if !ok {
		t.Fatalf("no pod %s", name)
	}
	v := index.Verdicts(p.Subject.Key)
	var cluster []netip.Prefix
	cluster = append(append(cluster, m.PodNetwork...), m.ServiceNetwork...)
	n := &verdict.Network{Cluster: cluster, Node: p.NodeIPs}
	return published{xds.Inbound(p.NodeIPs, xds.Resume), xds.Gate(v), xds.Outbound(v, n), xds.RBAC(v), wire.Message(v),
		wire.NetworkMessage(n), wire.PacketsMessage(index.Packets(name))}
}

// set makes the set to publish.
func (p published) set(t *testing.T) server.Set {
	t.Helper()
	var all []*server.Resource
	add := func(name string, m proto.Message) {
		r, err := server.NewResource(name, m)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	for _, c := range xds.Clusters() {
		add(c.Name, c)
	}
	for _, l := range []*listenerv3.Listener{p.inbound, p.gate, p.outbound} {
		add(l.Name, l)
	}
	add(p.rbac.Name, p.rbac)
	add(names.Verdicts, p.verdicts)
	add(names.Network, p.network)
	add(names.Packets, p.packets)
	set, err := server.NewSet(all...)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// brokenGate is a gate that would admit everybody, if Envoy took a map without entries.
func brokenGate(t *testing.T) *listenerv3.Listener {
	t.Helper()
	input, err := anypb.New(&networkv3.DestinationPortInput{})
	if err != nil {
		t.Fatal(err)
	}
	allow, err := anypb.New(wrapperspb.String(names.ChainAllow))
	if err != nil {
		t.Fatal(err)
	}
	l := xds.Gate(&verdict.Verdicts{})
	l.FilterChains = nil // Envoy writes down the whole resource before the reason, and no more than 4096 bytes of both
	l.FilterChainMatcher = &matcherv3.Matcher{
		MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{
			Input:    &corexds.TypedExtensionConfig{Name: "port", TypedConfig: input},
			TreeType: &matcherv3.Matcher_MatcherTree_ExactMatchMap{ExactMatchMap: &matcherv3.Matcher_MatcherTree_MatchMap{}},
		}},
		OnNoMatch: &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Action{
			Action: &corexds.TypedExtensionConfig{Name: names.ChainAllow, TypedConfig: allow},
		}},
	}
	return l
}

// brokenRBAC is a filter of another type: one that lets everybody pass, if Envoy took it.
func brokenRBAC(t *testing.T) *corev3.TypedExtensionConfig {
	t.Helper()
	config, err := anypb.New(&setfilterstatev3.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return &corev3.TypedExtensionConfig{Name: names.RBAC, TypedConfig: config}
}

// TestNACK: what Envoy refuses leaves the old policy in force, is recorded with its reason, is not sent again and holds nothing else up.
func TestNACK(t *testing.T) {
	const client = "shop/db"
	m := manifests(t, besieged)
	s := start(t, m, matrix.Options{})
	srv, db, api, evil := s.ControlPlane().Server(), pod(t, s, client), pod(t, s, "shop/api"), pod(t, s, "shop/evil")
	good := publishedFor(t, m, client)
	if srv.Publish(client, good.set(t)) {
		t.Fatal("this test does not make the resources that the control plane made")
	}
	thief := meshTLS(genuine(t, s.Authority(), identityOf(t, s, "shop/evil")))
	// The gate and rbac are what evil meets past its own sidecar; outbound is what db's app meets.
	enforced := func(denied, goesOut bool) {
		t.Helper()
		for i, a := range db.Spec().IPs {
			wantReached(t, probe(t, api, a, echo), client)
			if denied {
				if got := steal(t, evil, netip.AddrPortFrom(a, echo), thief, "hello\n"); got != 0 {
					t.Errorf("%s: a denied peer got %d bytes", a, got)
				}
			} else if peek(t, evil, netip.AddrPortFrom(a, banner), thief) == 0 {
				t.Errorf("%s: an admitted peer got no banner", a)
			}
			if o := probe(t, db, api.Spec().IPs[i], echo); goesOut {
				wantReached(t, o, "shop/api")
			} else {
				wantNothing(t, o)
			}
		}
	}
	enforced(true, true)

	broken := good
	broken.gate, broken.rbac, broken.outbound = brokenGate(t), brokenRBAC(t), xds.Outbound(&verdict.Verdicts{}, &verdict.Network{})
	if !srv.Publish(client, broken.set(t)) {
		t.Fatal("nothing new was published")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var refused *server.RefusedError
	if err := srv.Ledger().Wait(ctx, client); !errors.As(err, &refused) {
		t.Fatalf("waiting for what was refused: %v", err)
	}
	var status server.ClientStatus
	find := func(url, name string) server.ResourceStatus {
		for _, r := range status.Resources {
			if r.Type == url && r.Name == name {
				return r
			}
		}
		t.Fatalf("the ledger has no %s", name)
		return server.ResourceStatus{}
	}
	await(t, "both refusals, and the rest to be in force", func() bool {
		status, _ = srv.Ledger().Status(client)
		return find(server.ListenerType, names.Gate).Refusal != nil && find(server.ExtensionType, names.RBAC).Refusal != nil &&
			find(server.ListenerType, names.Outbound).InForce
	})
	for _, c := range []struct{ url, name, says string }{
		{server.ListenerType, names.Gate, "MatchMapValidationError.Map: value must contain at least 1 pair"}, {server.ExtensionType, names.RBAC, "set_filter_state"},
	} {
		r := find(c.url, c.name)
		if r.InForce || r.Refusal == nil || r.Refusal.Version != r.Wanted || r.Acked == r.Wanted || r.Acked == "" ||
			!strings.Contains(r.Refusal.Reason, c.says) {
			t.Errorf("%s: %+v, refusal %+v", c.name, r, r.Refusal)
		}
	}
	if status.InForce {
		t.Error("the ledger says that all is in force")
	}
	enforced(true, false)

	// Never the same bytes again: not when they are published once more, and not with something else.
	before := status.Counters
	if srv.Publish(client, broken.set(t)) {
		t.Error("the same resources count as new")
	}
	partly := broken
	partly.outbound = good.outbound
	srv.Publish(client, partly.set(t))
	await(t, "the old outbound", func() bool {
		status, _ = srv.Ledger().Status(client)
		return find(server.ListenerType, names.Outbound).InForce
	})
	for url, want := range map[string]uint64{server.ListenerType: 1, server.ExtensionType: 0} {
		was, is := before[url], status.Counters[url]
		if is.Nacks != was.Nacks || is.Resources != was.Resources+want {
			t.Errorf("%s: %+v, then %+v", url, was, is)
		}
	}
	enforced(true, true)

	// The way out is a good version, and there is a way back.
	opened := *m
	opened.Objects.NetworkPolicies = nil
	for _, step := range []struct {
		is     published
		denied bool
	}{{publishedFor(t, &opened, client), false}, {good, true}} {
		srv.Publish(client, step.is.set(t))
		if err := srv.Ledger().Wait(ctx, client); err != nil {
			t.Fatal(err)
		}
		enforced(step.denied, true)
	}
	if status, _ = srv.Ledger().Status(client); !status.InForce {
		t.Errorf("after all: %+v", status.Resources)
	}
}
