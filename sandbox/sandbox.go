package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/server"
)

// controlPlanePort is where the control plane listens on the node.
const controlPlanePort = 15010

// Config says what to run.
type Config struct {
	Manifests *source.Manifests
	Policy    policy.Config
	Options   matrix.Options
	Binaries  Binaries
	Lifetimes Lifetimes
	Log       *slog.Logger
	// Progress is told of each step: what is done, how much of how much.
	Progress func(what string, done, of int)
}

// Sandbox is a running set of pods. It works inside a netns enclosure only.
type Sandbox struct {
	cfg       Config
	dir       string
	envoy     string // where Envoy is bound to; empty: nowhere yet
	network   *netns.Network
	cp        *controlplane.ControlPlane
	authority *ca.CA
	minter    *attest.Minter
	grpc      *grpc.Server
	serving   sync.WaitGroup
	brake     brake         // of the control plane's connections
	index     *policy.Index // the evaluator that the packets are held against; apart from the control plane's own
	enclosure netns.Enclosure
	running   context.Context // of the agents: it ends with Close
	end       context.CancelFunc
	mu        sync.RWMutex // of pods, for those who come from the console: all else happens one after the other
	pods      map[string]*pod
	made      map[string]int // how many pods of a name there have been: each has a UID of its own
	agents    int            // started so far
	outsides  map[netip.Prefix]outside
	tries     int // calls of Try so far: each has nonces of its own
}

// pod is one pod of the sandbox.
type pod struct {
	name  string // "namespace/name"
	uid   string
	spec  *corev1.Pod
	ports []matrix.Listener
	net   *netns.Pod
	agent *agent // nil without sidecar, and while that is dead
	dir   string // of the agent's files; "": it never had one
}

// Start brings everything up and returns when every sidecar is ready. When it fails, what had been started is ended.
func Start(ctx context.Context, cfg Config) (s *Sandbox, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Progress == nil {
		cfg.Progress = func(string, int, int) {}
	}
	enclosure, err := netns.Enclosed()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(enclosure.RunDir, "")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // Envoy runs as another user
		return nil, err
	}
	s = &Sandbox{cfg: cfg, dir: dir, enclosure: enclosure, pods: map[string]*pod{}, made: map[string]int{}, outsides: map[netip.Prefix]outside{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
			s = nil
		}
	}()
	s.running, s.end = context.WithCancel(context.WithoutCancel(ctx))
	s.index = policy.NewIndex(cfg.Policy)
	if err := s.index.ApplyAll(&cfg.Manifests.Objects); err != nil {
		return s, err
	}
	if s.network, err = netns.New(netns.Config{Logger: cfg.Log}); err != nil {
		return s, err
	}
	if err := s.serve(ctx); err != nil {
		return s, err
	}
	if err := s.makePods(ctx, cfg.Manifests.Objects.Pods); err != nil {
		return s, err
	}
	if err := s.lead(ctx); err != nil {
		return s, err
	}
	if err := s.nameHosts(); err != nil {
		return s, err
	}
	return s, s.startAgents(ctx)
}

// serve makes what outlives a control plane, and starts one.
func (s *Sandbox) serve(ctx context.Context) error {
	var err error
	if s.authority, err = ca.New(ca.Config{TrustDomain: s.cfg.Policy.TrustDomain, TTL: s.cfg.Lifetimes.SVID}); err != nil {
		return err
	}
	s.minter = attest.NewMinter(attest.MinterConfig{})
	return s.startControlPlane(ctx)
}

// startControlPlane starts a control plane on the node's addresses.
func (s *Sandbox) startControlPlane(ctx context.Context) error {
	v4, v6 := s.network.Addresses()
	cp, grpcServer, err := controlplane.NewServer(
		controlplane.Config{Policy: s.cfg.Policy, ServiceNetwork: s.cfg.Manifests.ServiceNetwork, Resumption: s.cfg.Lifetimes.Resumption, Log: s.cfg.Log},
		s.authority, s.minter, server.Config{Log: s.cfg.Log}, []netip.Addr{v4, v6})
	if err != nil {
		return err
	}
	s.cp, s.grpc = cp, grpcServer
	objects := s.cfg.Manifests.Objects
	objects.Pods = nil
	for _, p := range s.cfg.Manifests.Objects.Pods {
		q := s.withUID(p)
		if is := s.pods[p.Namespace+"/"+p.Name]; is != nil {
			q.UID = types.UID(is.uid)
		}
		objects.Pods = append(objects.Pods, q)
	}
	if err := cp.Load(&objects); err != nil {
		return err
	}
	for _, a := range []netip.Addr{v4, v6} {
		var lc net.ListenConfig
		lis, err := lc.Listen(ctx, "tcp", netip.AddrPortFrom(a, controlPlanePort).String())
		if err != nil {
			return fmt.Errorf("control plane: %w", err)
		}
		s.serving.Go(func() {
			if err := grpcServer.Serve(braked{lis, &s.brake}); err != nil {
				s.cfg.Log.Error("the control plane's server ended", "error", err)
			}
		})
	}
	return nil
}

// controlPlaneFor is where a pod reaches the control plane: over IPv4, if it has an address of that family.
func (s *Sandbox) controlPlaneFor(p *pod) string {
	node, v6 := s.network.Addresses()
	if !slices.ContainsFunc(p.net.Spec().IPs, netip.Addr.Is4) {
		node = v6
	}
	return netip.AddrPortFrom(node, controlPlanePort).String()
}

// uid is the pod's own, or one made from its name and how often there has been one of that name: manifests have none.
func (s *Sandbox) uid(p *corev1.Pod) types.UID {
	if p.UID != "" {
		return p.UID
	}
	name := p.Namespace + "/" + p.Name
	return types.UID(fmt.Sprintf("sandbox/%s/%d", name, s.made[name]))
}

// withUID is the pod with the UID under which its agent is attested.
func (s *Sandbox) withUID(p *corev1.Pod) *corev1.Pod {
	p = p.DeepCopy()
	p.UID = s.uid(p)
	return p
}

func (s *Sandbox) makePods(ctx context.Context, list []*corev1.Pod) error {
	if len(list) == 0 {
		return nil
	}
	s.cfg.Progress("pods", 0, len(list))
	var specs []netns.PodSpec
	for _, p := range list {
		ports, err := matrix.Listeners(p, s.cfg.Options.Ports)
		if err != nil {
			return err
		}
		spec := netns.PodSpec{Namespace: p.Namespace, Name: p.Name, IPs: matrix.PodAddrs(p)}
		for _, l := range ports {
			if proto, ok := carried(l.Protocol); ok {
				spec.Ports = append(spec.Ports, netns.Port{Number: l.Port, Protocol: proto, Speaks: speaks(l)})
			}
		}
		specs = append(specs, spec)
		name := p.Namespace + "/" + p.Name
		s.mu.Lock()
		s.pods[name] = &pod{name: name, uid: string(s.uid(p)), spec: p, ports: ports}
		s.mu.Unlock()
		s.made[name]++
	}
	made, err := s.network.AddPods(ctx, specs)
	if err != nil {
		return err
	}
	s.mu.Lock()
	for i, p := range list {
		s.pods[p.Namespace+"/"+p.Name].net = made[i]
	}
	s.mu.Unlock()
	s.cfg.Progress("pods", len(list), len(list))
	return nil
}

func speaks(l matrix.Listener) netns.Speaks {
	if l.ServerFirst {
		return netns.ServerFirst
	}
	return netns.ClientFirst
}

// services is what kube-proxy would do for pods without a sidecar: any ready endpoint, no policy asked.
func (s *Sandbox) services() []netns.Service {
	var out []netns.Service
	for _, svc := range s.cfg.Manifests.Objects.Services {
		name := svc.Namespace + "/" + svc.Name
		for _, a := range slices.Concat(s.index.ServiceAddrs(name), s.index.ServiceExternalAddrs(name)) {
			for _, p := range svc.Spec.Ports {
				proto, err := verdict.ParseProtocol(string(p.Protocol))
				number, ok := carried(proto)
				if err != nil || !ok {
					continue
				}
				at := netip.AddrPortFrom(a, uint16(p.Port))
				d, _ := s.index.Destination(proto, at)
				if d.Service != name {
					continue // it is somebody else's
				}
				sv := netns.Service{Addr: at, Protocol: number}
				for _, e := range d.Endpoints {
					sv.Backends = append(sv.Backends, e.Addr)
				}
				out = append(out, sv)
			}
		}
	}
	return append(out, s.hostPorts(out)...)
}

// hostPorts is what CNI's portmap would do: what pods send to a host port at the node's address goes to the pod, and comes from the node. All pods being on
// one machine here, of several nodes of the manifests the first by name has the port, and services go first.
func (s *Sandbox) hostPorts(services []netns.Service) (out []netns.Service) {
	node4, node6 := s.network.Addresses()
	for _, at := range s.index.ClaimedHostPorts() {
		number, ok := carried(at.Protocol)
		if !ok {
			continue
		}
		for _, a := range []netip.Addr{node4, node6} {
			to := netip.AddrPortFrom(a, at.Port)
			same := func(sv netns.Service) bool { return sv.Addr == to && sv.Protocol == number }
			if slices.ContainsFunc(services, same) || slices.ContainsFunc(out, same) {
				continue
			}
			d, _ := s.index.DestinationFor(s.index.PodsOn(at.Node)[0], at.Protocol, to)
			if d.Service == "" && len(d.Endpoints) == 1 && d.Endpoints[0].Pod != "" {
				out = append(out, netns.Service{Addr: to, Protocol: number, Backends: []netip.AddrPort{d.Endpoints[0].Addr}, Masqueraded: true})
			}
		}
	}
	return out
}

// startAgents starts the sidecars of all injected pods that have none running, and waits until each is ready.
func (s *Sandbox) startAgents(ctx context.Context) error {
	injected, err := s.launchAgents()
	if err != nil {
		return err
	}
	var mu sync.Mutex
	ready := 0
	g, gctx := errgroup.WithContext(ctx)
	for _, p := range injected {
		g.Go(func() error {
			if err := p.agent.waitReady(gctx); err != nil {
				return fmt.Errorf("sidecar of %s: %w", p.name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			ready++
			s.cfg.Progress("sidecars", ready, len(injected))
			return nil
		})
	}
	return g.Wait()
}

// launchAgents starts the sidecars of all injected pods that have none running, and returns these pods.
func (s *Sandbox) launchAgents() ([]*pod, error) {
	var injected []*pod
	for _, p := range s.pods {
		if p.agent == nil && p.spec.Annotations[policy.SidecarAnnotation] == policy.SidecarInjected {
			injected = append(injected, p)
		}
	}
	slices.SortFunc(injected, func(a, b *pod) int { return strings.Compare(a.name, b.name) })
	if len(injected) == 0 {
		return nil, nil
	}
	run, err := s.agentRun()
	if err != nil {
		return nil, err
	}
	s.cfg.Progress("sidecars", 0, len(injected))
	for _, p := range injected {
		if err := s.launch(run, p); err != nil {
			return nil, err
		}
	}
	return injected, nil
}

// launch starts the agent of a pod, in the folder of the one before it.
func (s *Sandbox) launch(run agentRun, p *pod) error {
	token, _, err := s.minter.Mint(attest.Pod{Namespace: p.spec.Namespace, Name: p.spec.Name, UID: p.uid}, attest.Audience)
	if err != nil {
		return err
	}
	if p.dir == "" {
		p.dir = filepath.Join(s.dir, "pods", strconv.Itoa(s.agents)) // short: paths of unix sockets are bounded
		s.agents++
	}
	p.agent, err = run.start(s.running, p.net, s.controlPlaneFor(p), p.dir, token)
	return err
}

// agentRun is what all agents are started with. The first time it lays out their files.
func (s *Sandbox) agentRun() (agentRun, error) {
	run := agentRun{
		binary: s.cfg.Binaries.Agent, envoy: filepath.Join(s.dir, "envoy"), bundle: s.bundleFile(),
		trustDomain: s.cfg.Policy.TrustDomain.Name(), single: s.enclosure.SingleUID, lifetimes: s.cfg.Lifetimes,
	}
	if s.envoy != "" {
		return run, nil
	}
	if err := reachable(s.cfg.Binaries.Envoy, run.envoy); err != nil {
		return run, err
	}
	s.envoy = run.envoy
	return run, s.writeBundle(s.authority.Bundle())
}

// Pod is a pod's network namespace, to run something else in.
func (s *Sandbox) Pod(name string) (*netns.Pod, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	p, ok := s.pods[name]
	if !ok {
		return nil, false
	}
	return p.net, true
}

// Network is the node.
func (s *Sandbox) Network() *netns.Network { return s.network }

// Authority is the CA that signs the pods' identities. With its key one can play an attacker who has stolen an identity.
func (s *Sandbox) Authority() *ca.CA { return s.authority }

// RotateRoot has the authority go over to another root, in steps that nobody notices (see controlplane.Rotate).
func (s *Sandbox) RotateRoot(ctx context.Context, next ca.Material) error {
	if s.cp == nil {
		return errors.New("rotate the root: the control plane is stopped")
	}
	return s.cp.Rotate(ctx, next, s.writeBundle)
}

// writeBundle is where agents that start read whom they trust at first.
func (s *Sandbox) writeBundle(b *x509bundle.Bundle) error {
	text, err := b.Marshal()
	if err != nil {
		return err
	}
	return os.WriteFile(s.bundleFile(), text, 0o644)
}

func (s *Sandbox) bundleFile() string { return filepath.Join(s.dir, "bundle.pem") }

// ControlPlane is the running control plane; nil while it is stopped.
func (s *Sandbox) ControlPlane() *controlplane.ControlPlane { return s.cp }

// Identity is the SPIFFE ID of a pod.
func (s *Sandbox) Identity(name string) (spiffeid.ID, bool) {
	subject := s.index.Subject(name)
	if subject == nil {
		return spiffeid.ID{}, false
	}
	return subject.ID, true
}

// Close ends everything. What a killed process leaves behind the enclosure takes with it.
func (s *Sandbox) Close() error {
	var errs []error
	var g errgroup.Group
	for _, p := range s.pods {
		if p.agent != nil {
			g.Go(p.agent.stop)
		}
	}
	errs = append(errs, g.Wait())
	if s.cp != nil {
		s.cp.Close()
	}
	if s.grpc != nil {
		s.grpc.Stop()
	}
	s.serving.Wait()
	if s.end != nil {
		s.end()
	}
	if s.network != nil {
		errs = append(errs, s.network.Close())
	}
	if s.envoy != "" {
		errs = append(errs, unix.Unmount(s.envoy, unix.MNT_DETACH))
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

// stopPatience is how long an agent may take to drain.
const stopPatience = 5 * time.Second
