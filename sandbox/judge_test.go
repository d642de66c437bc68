package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
)

func TestMain(m *testing.M) { netns.TestMain(m) }

const unguarded = `
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {containers: [{name: c, image: i}]}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: shop, labels: {app: server}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 53, protocol: UDP}, {containerPort: 54, protocol: UDP}, {containerPort: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: shop}
spec: {selector: {app: server}, ports: [{port: 53, protocol: UDP}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}}
`

// TestTryTellsWhatPacketsDo runs pods that nobody guards, and then holds the same packets against an evaluator that takes them for guarded:
// all that gets through is a difference, and so is what is dropped on the way although nobody denies it.
func TestTryTellsWhatPacketsDo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "m.yaml")
	if err := os.WriteFile(file, []byte(unguarded), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := source.ReadManifests([]string{file}, source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	outside, err := matrix.ParseExternal("203.0.113.0/24:53/UDP")
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Manifests: m, Policy: policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"), PodNetwork: m.PodNetwork},
		Options: matrix.Options{External: []matrix.External{outside}}}
	s, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	all, err := matrix.Plan(m, cfg.Options)
	if err != nil {
		t.Fatal(err)
	}
	was := patience
	patience = []time.Duration{200 * time.Millisecond, 400 * time.Millisecond}
	defer func() { patience = was }()

	report := tryAll(t, s, all)
	if sum := report.Summary; sum.Allowed != len(all) || sum.Mismatches != 0 {
		t.Errorf("nobody guards anything: %+v %+v", sum, report.Connections)
	}
	udp := 0
	for _, c := range report.Connections {
		if c.Protocol == "UDP" {
			udp++
		}
		if c.Bytes == 0 || c.Authenticated || (c.Datagram == matrix.Answered) != (c.Protocol == "UDP") || (c.Connect == matrix.Connected) != (c.Protocol == "TCP") {
			t.Errorf("%s: %+v", &c, c.Observed)
		}
	}
	if udp != 2*(2*2+2+1) { // each pod: two ports of the server in two families, its Service in two, the outside
		t.Errorf("%d UDP connections tried", udp)
	}

	server, _ := s.Pod("shop/server")
	for port, hook := range map[uint16]*nftables.ChainHook{53: nftables.ChainHookPrerouting, 54: nftables.ChainHookPostrouting} {
		if err := server.Do(func() error { return dropDatagrams(hook, port) }); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range tryAll(t, s, all).Connections {
		if c.Protocol == "TCP" || c.Via == matrix.ViaExternal || c.From == "shop/server" {
			continue
		}
		want, text := matrix.Silence, "the evaluator says allowed"
		if c.Port == 54 {
			want, text = matrix.Unanswered, "arrived at shop/server:54, and the source heard: unanswered"
		}
		if c.Datagram != want || !strings.Contains(c.Mismatch, text) || c.Bytes != 0 {
			t.Errorf("%s: %+v, mismatch %q; want %s, %q", &c, c.Observed, c.Mismatch, want, text)
		}
	}

	guarded := m.Objects
	guarded.Pods = nil
	for _, p := range m.Objects.Pods {
		p = p.DeepCopy()
		p.Annotations = map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}
		guarded.Pods = append(guarded.Pods, p)
	}
	s.index = policy.NewIndex(cfg.Policy)
	if err := s.index.ApplyAll(&guarded); err != nil {
		t.Fatal(err)
	}
	for _, c := range tryAll(t, s, all).Connections {
		if c.Via == matrix.ViaExternal || c.From == "shop/server" {
			continue
		}
		leak := c.Protocol == "TCP" || c.Port == 54
		if (c.Mismatch != "") != leak || leak && !strings.Contains(c.Mismatch, "the evaluator says denied") {
			t.Errorf("%s: %+v, mismatch %q", &c, c.Observed, c.Mismatch)
		}
	}
}

func tryAll(t *testing.T, s *Sandbox, attempts []matrix.Attempt) *matrix.Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	res, err := s.Try(ctx, attempts)
	if err != nil {
		t.Fatal(err)
	}
	return res.Report
}

// dropDatagrams drops in the current namespace what comes in for a UDP port, or what goes out from it.
func dropDatagrams(hook *nftables.ChainHook, port uint16) error {
	offset := uint32(2)
	if hook == nftables.ChainHookPostrouting {
		offset = 0
	}
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "drop"})
	chain := c.AddChain(&nftables.Chain{Table: table, Name: fmt.Sprintf("port-%d", port), Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	return c.Flush()
}
