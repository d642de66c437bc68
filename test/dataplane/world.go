package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/server"
)

var trustDomain = spiffeid.RequireTrustDomainFromString("mantlet.local")

// world is all variants, up and running.
type world struct {
	sandbox *sandbox.Sandbox
	lanes   []*lane
}

// lane is a running variant.
type lane struct {
	variant
	client, server *app
	to             netip.Addr
	proxies        []*proxy // client's, server's; none where the path is direct
}

// build starts everything, inside the enclosure. What it started is ended when it fails.
func build(ctx context.Context, chosen []variant, b sandbox.Binaries) (w *world, err error) {
	enclosure, err := netns.Enclosed()
	if err != nil {
		return nil, err
	}
	text := namespaces
	for _, v := range chosen {
		text += v.manifests()
	}
	file := filepath.Join(enclosure.RunDir, "dataplane.yaml") // goes away with the enclosure, like all files below
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	m, err := source.ReadManifests([]string{file}, source.Options{})
	if err != nil {
		return nil, err
	}
	w = &world{}
	w.sandbox, err = sandbox.Start(ctx, sandbox.Config{
		Manifests: m, Policy: policy.Config{TrustDomain: trustDomain, PodNetwork: m.PodNetwork}, Binaries: b,
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
			w = nil
		}
	}()
	if err := w.gather(ctx, chosen, m.PodNetwork); err != nil {
		return w, err
	}
	for i, v := range chosen {
		dir := filepath.Join(enclosure.RunDir, strconv.Itoa(i)) // short: paths of unix sockets are bounded
		l, err := w.open(ctx, v, b.Envoy, dir)
		if err != nil {
			return w, fmt.Errorf("%s: %w", v.name, err)
		}
		w.lanes = append(w.lanes, l)
	}
	return w, nil
}

// gather tells the control plane of the crowd, and returns when every sidecar has confirmed what that means for it.
func (w *world) gather(ctx context.Context, chosen []variant, network []netip.Prefix) error {
	most := 0
	var sidecars []string
	for _, v := range chosen {
		if v.path >= permissive {
			most = max(most, v.admitted-1)
			sidecars = append(sidecars, v.client(), v.server())
		}
	}
	pods, err := crowd(most, chosen, network)
	if err != nil {
		return err
	}
	if err := w.sandbox.ControlPlane().Update(pods, nil); err != nil {
		return err
	}
	for _, name := range sidecars {
		if err := w.sandbox.ControlPlane().Server().Ledger().Wait(ctx, server.Client(name)); err != nil {
			return fmt.Errorf("sidecar of %s: %w", name, err)
		}
	}
	return nil
}

// crowd makes pods that are an identity each, with addresses from the upper half of the pod network, where no pod of a variant is.
func crowd(n int, chosen []variant, network []netip.Prefix) ([]metav1.Object, error) {
	var upper netip.Addr
	for _, p := range network {
		if p.Addr().Is4() && 1<<(31-p.Bits()) > n {
			a := p.Masked().Addr().As4()
			upper = netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(a[:])+1<<(31-p.Bits()))))
		}
	}
	if !upper.IsValid() {
		return nil, fmt.Errorf("no IPv4 range of the pod network %v has room for %d pods more", network, n)
	}
	var out []metav1.Object
	for i := range n {
		labels := map[string]string{crowdLabel: strconv.Itoa(i)}
		for _, v := range chosen {
			if i < v.admitted-1 {
				labels[crowdOf(v.admitted)] = "yes"
			}
		}
		upper = upper.Next()
		out = append(out, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "crowd", Name: fmt.Sprintf("pod-%d", i), Labels: labels,
				Annotations: map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}},
			Spec:   corev1.PodSpec{ServiceAccountName: "default"},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: upper.String()}}},
		})
	}
	return out, nil
}

// open starts the apps of a variant, and what stands between them where that is not Mantlet's.
func (w *world) open(ctx context.Context, v variant, envoy, dir string) (*lane, error) {
	client, ok := w.sandbox.Pod(v.client())
	serving, okToo := w.sandbox.Pod(v.server())
	if !ok || !okToo {
		return nil, errors.New("its pods are not there")
	}
	l := &lane{variant: v}
	for _, a := range serving.Spec().IPs {
		if a.Is4() {
			l.to = a
		}
	}
	if !l.to.IsValid() {
		return nil, fmt.Errorf("%s has no IPv4 address", v.server())
	}
	var err error
	switch v.path {
	case direct:
	case plaintext, linear:
		l.proxies, err = w.pair(ctx, v, client, serving, envoy, dir)
	case permissive, strict:
		for _, name := range []string{v.client(), v.server()} {
			p, ferr := findSidecar(name)
			l.proxies, err = append(l.proxies, p), errors.Join(err, ferr)
		}
	}
	if err != nil {
		return nil, err
	}
	if l.server, err = startApp(ctx, serving, appServer); err != nil {
		return nil, err
	}
	l.client, err = startApp(ctx, client, appClient)
	return l, err
}

// pair starts a pair of Envoys that is not Mantlet's.
func (w *world) pair(ctx context.Context, v variant, client, serving *netns.Pod, envoy, dir string) ([]*proxy, error) {
	ends := []*end{{Name: v.client()}, {Name: v.server(), Server: true}}
	pods := []*netns.Pod{client, serving}
	var out []*proxy
	for i, e := range ends {
		at := dir + strings.Repeat("s", i)
		if err := os.Mkdir(at, 0o700); err != nil {
			return nil, err
		}
		if v.path == linear {
			own, _ := w.sandbox.Identity(e.Name)
			peer, _ := w.sandbox.Identity(ends[1-i].Name)
			var err error
			if e.TLS, err = prove(w.sandbox.Authority(), own, peer, at); err != nil {
				return nil, err
			}
			e.TLS.Curves = v.curves
			e.Principals = principals(v.admitted, peer)
		}
		p, err := e.start(ctx, pods[i], envoy, at)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// principals is a list of identities that ends with the one that comes: all others are asked about before.
func principals(n int, last spiffeid.ID) []string {
	var out []string
	for i := range n - 1 {
		out = append(out, fmt.Sprintf("spiffe://%s/ns/crowd/sa/default/labels/%064x", trustDomain.Name(), i))
	}
	return append(out, last.String())
}

// close ends the apps, and then everything.
func (w *world) close() error {
	var errs []error
	for _, l := range w.lanes {
		errs = append(errs, l.client.stop(), l.server.stop())
	}
	return errors.Join(append(errs, w.sandbox.Close())...)
}
