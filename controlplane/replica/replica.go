// Package replica is one process of the control plane in a Kubernetes cluster, from first to last.
//
//	health port: /healthz, /metrics at once; /readyz once pods are served
//	Secret ──authority.Open──► CA ──► the webhooks' port is opened, where there are Settings
//	API server ──source/kube──► the whole cluster ──► controlplane.NewServer, Load ──► the agents' port is opened
//	                            every change        ──► Update
//	Secret ──retired.Records──► what running pods no longer are: before Load, and whatever another replica adds
//	the end is asked for        ──► /readyz: 503; all else goes on for the grace, in which the agents' streams are ended one by one; then the ports are closed
//
// Replicas share nothing but the cluster: any serves any agent. They hold nothing of it, no Lease either, that one would have to give back at its end.
package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/controlplane/admission"
	"github.com/mantlet/mantlet/controlplane/authority"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/metrics"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/retired"
	"github.com/mantlet/mantlet/controlplane/settings"
	"github.com/mantlet/mantlet/controlplane/source/kube"
	"github.com/mantlet/mantlet/controlplane/tokenreview"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds"
	"github.com/mantlet/mantlet/xds/server"
)

// Config is what a replica is told. Required are API, TrustDomain, Listen, Health, Secret and Log.
type Config struct {
	API         *rest.Config
	TrustDomain spiffeid.TrustDomain
	Listen      string   // where agents come, "host:port"
	Health      string   // where probes and Prometheus come, "host:port"
	Status      string   // where `mantlet status` comes, "host:port" with an address of loopback; empty: nowhere
	Name        string   // of the replica, in its reports
	Exempt      []string // namespaces whose pods get no sidecars, in its reports
	Secret      types.NamespacedName

	Networks  kube.Networks // beside what nodes and ServiceCIDRs say; see kube.Config
	NodeAddrs []netip.Addr
	NodePorts verdict.PortRange // zero: verdict.DefaultNodePorts
	Mode      verdict.Mode      // of namespaces that do not say; zero: permissive
	Sessions  xds.Resumption    // zero: on
	TTL       time.Duration     // of X.509-SVIDs; zero: ca.DefaultTTL
	Grace     time.Duration     // how long it goes on serving once it is asked to end, see Grace; zero: it ends at once
	Log       *slog.Logger

	// Settings of an installation, and where the API server comes with pods to be given sidecars, "host:port"; nil: nobody is injected. The fields
	// above hold, whatever Settings says of the same.
	Settings *settings.Settings
	Webhooks string

	// Listening, if set, is told where the ports are, which Listen and Health may leave to the system (":0").
	Listening func(agents, health net.Addr)
}

// reviewRate bounds TokenReviews per second, and as many pods that are created: all agents come when a control plane starts, and have seconds of
// patience.
const reviewRate = 500

// recordRate bounds per second how often the Secret with retired identities is read and written, half a megabyte at worst.
const recordRate = 4

// Run runs a replica until ctx ends, and Config.Grace longer, and then returns nil; nothing of it runs any more. An API server that is away is waited
// for. Where a part of it fails it ends at once, with the error.
func Run(ctx context.Context, cfg Config) error {
	asked := ctx // its end is what asks; what runs lasts longer
	clients, err := clientsFor(cfg.API, cfg.Log)
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	probes, err := lc.Listen(ctx, "tcp", cfg.Health)
	if err != nil {
		return fmt.Errorf("health port: %w", err)
	}
	var reports net.Listener
	if cfg.Status != "" {
		if reports, err = listenStatus(ctx, cfg.Status); err != nil {
			_ = probes.Close()
			return err
		}
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	r := &replica{cfg: cfg, clients: clients, registry: registry, health: probes.Addr(), asked: asked.Done()}
	r.records = retired.New(retired.Config{
		Client: clients.records, Watch: clients.watch, Name: types.NamespacedName{Namespace: cfg.Secret.Namespace, Name: names.RetiredSecret},
		Worst: controlplane.RetiredFor(cfg.TTL), Log: cfg.Log,
	})

	lasting, end := context.WithCancel(context.WithoutCancel(asked))
	defer end()
	parts, ctx := errgroup.WithContext(lasting)
	parts.Go(func() error {
		select {
		case <-asked.Done():
			r.leave(ctx)
			end()
		case <-ctx.Done(): // a part has failed
		}
		return nil
	})
	parts.Go(func() error { return r.serveHealth(ctx, probes) })
	if reports != nil {
		parts.Go(func() error { return r.serveStatus(ctx, reports) })
	}
	parts.Go(func() error {
		secret := authority.Secret{Client: clients.watch, Name: cfg.Secret, Log: cfg.Log}
		root, err := r.open(ctx, secret)
		if err != nil || root == nil {
			return err
		}
		bundle, err := authority.NewBundle(clients.watch, func() ([]byte, error) { return root.Bundle().Marshal() }, cfg.Log)
		if err != nil {
			return err
		}
		r.bundle.Store(bundle)
		parts.Go(func() error { return bundle.Run(ctx) })
		if cfg.Settings != nil {
			parts.Go(func() error { return r.admit(ctx, root) })
		}
		parts.Go(func() error { return secret.Follow(ctx, root, bundle.Changed) })
		return r.run(ctx, root)
	})
	return parts.Wait()
}

// clients are those of one API server: what is watched does not wait behind what agents ask for, nor do pods that are created: anybody can have
// tokens reviewed that are none, and who may relabel pods can do so as fast as they like.
type clients struct{ watch, keys, review, admit, records kubernetes.Interface }

func clientsFor(api *rest.Config, log *slog.Logger) (c clients, err error) {
	base := rest.CopyConfig(api)
	base.UserAgent = "mantlet-control-plane"
	watch := rest.CopyConfig(base)
	watch.QPS, watch.Burst = 50, 100
	watch.Wrap(persist(log))
	if c.watch, err = kubernetes.NewForConfig(watch); err != nil {
		return c, fmt.Errorf("client of the API server: %w", err)
	}
	review := rest.CopyConfig(base)
	review.QPS, review.Burst = reviewRate, 2*reviewRate
	for _, own := range []*kubernetes.Interface{&c.keys, &c.review, &c.admit} { // each with a rate limit of its own
		if *own, err = kubernetes.NewForConfig(rest.CopyConfig(review)); err != nil {
			return c, fmt.Errorf("client of the API server: %w", err)
		}
	}
	records := rest.CopyConfig(base)
	records.QPS, records.Burst = recordRate, 5*recordRate
	if c.records, err = kubernetes.NewForConfig(records); err != nil {
		return c, fmt.Errorf("client of the API server: %w", err)
	}
	return c, nil
}

type replica struct {
	cfg      Config
	clients  clients
	registry *prometheus.Registry
	health   net.Addr
	records  *retired.Records
	bundle   atomic.Pointer[authority.Bundle]
	plane    atomic.Pointer[controlplane.ControlPlane]
	serving  atomic.Bool
	asked    <-chan struct{} // closed once it is asked to end
	leaving  atomic.Bool     // it is, and goes on serving for the grace
}

// openAgain is between two attempts to reach the Secret.
const openAgain = 2 * time.Second

// open opens the authority, as soon as the API server lets it. It returns nil when ctx ends first.
func (r *replica) open(ctx context.Context, secret authority.Secret) (*ca.CA, error) {
	for {
		root, err := secret.Open(ctx, ca.Config{TrustDomain: r.cfg.TrustDomain, TTL: r.cfg.TTL})
		switch {
		case err == nil:
			return root, nil
		case errors.Is(err, authority.ErrUnusable):
			return nil, err
		case ctx.Err() != nil:
			return nil, nil //nolint:nilerr // asked to end
		}
		r.cfg.Log.Warn("the secret with the root cannot be had; it is tried again", "error", err, "retry_in", openAgain)
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(openAgain):
		}
	}
}

// admit answers the API server's questions about pods. It needs nothing of the cluster's state, so that pods can be created as soon as there is
// an authority.
func (r *replica) admit(ctx context.Context, root *ca.CA) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", r.cfg.Webhooks)
	if err != nil {
		return fmt.Errorf("webhooks' port: %w", err)
	}
	return admission.Run(ctx, admission.Config{Settings: r.cfg.Settings, Client: r.clients.admit, Authority: root, Listener: l, Leaving: r.asked, Log: r.cfg.Log})
}

// run brings the cluster to the agents.
func (r *replica) run(ctx context.Context, root *ca.CA) error {
	var ends []func() error
	source := kube.New(kube.Config{Client: r.clients.watch, Log: r.cfg.Log, Networks: r.cfg.Networks, NodeAddrs: r.cfg.NodeAddrs})
	err := source.Run(ctx, func(n kube.Networks, o *policy.Objects) (kube.Target, error) {
		// Read after the cluster was: who relabels from here on is seen here too.
		if !r.recall(ctx) {
			return nil, ctx.Err()
		}
		cp, g, err := r.controlPlane(root, n)
		if err != nil {
			return nil, err
		}
		if err := cp.Recall(r.records.Known()); err != nil {
			return nil, err
		}
		if err := cp.Load(o); err != nil { // of single objects; the others are in force
			r.cfg.Log.Error("the cluster has not been taken over in full", "error", err)
		}
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", r.cfg.Listen)
		if err != nil {
			cp.Close()
			return nil, fmt.Errorf("agents' port: %w", err)
		}
		served, recorded := make(chan error, 1), make(chan error, 1)
		go func() { served <- g.Serve(l) }()
		go func() { recorded <- r.records.Run(ctx, cp.Recall) }()
		ends = append(ends, func() error {
			r.serving.Store(false)
			cp.Close()
			stop(g)
			return errors.Join(<-served, <-recorded)
		})
		r.registry.MustRegister(metrics.Ledger(cp.Server().Ledger()))
		r.plane.Store(cp)
		r.serving.Store(true)
		r.cfg.Log.Info("agents are served", "address", l.Addr().String())
		if r.cfg.Listening != nil {
			r.cfg.Listening(l.Addr(), r.health)
		}
		return cp, nil
	})
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		err = nil // asked to end before it could start
	}
	for _, end := range ends {
		err = errors.Join(err, end())
	}
	return err
}

// recall reads what is on record of retired identities, as soon as the API server lets it. It returns false when ctx ends first.
func (r *replica) recall(ctx context.Context) bool {
	for {
		err := r.records.Open(ctx)
		if err == nil {
			return true
		}
		r.cfg.Log.Warn("what is retired cannot be read, and nobody is served before; it is tried again", "error", err, "retry_in", openAgain)
		select {
		case <-ctx.Done():
			return false
		case <-time.After(openAgain):
		}
	}
}

func (r *replica) controlPlane(root *ca.CA, n kube.Networks) (*controlplane.ControlPlane, *grpc.Server, error) {
	if len(n.Pods) == 0 {
		r.cfg.Log.Warn("no pod network is known: no node has podCIDRs, and none is configured; destinations in the cluster are taken for outside until one is")
	}
	return controlplane.NewServer(
		controlplane.Config{
			Policy:         policy.Config{TrustDomain: r.cfg.TrustDomain, PodNetwork: n.Pods, DefaultMode: r.cfg.Mode},
			ServiceNetwork: n.Services, NodePorts: r.cfg.NodePorts, Resumption: r.cfg.Sessions, Records: r.records, Log: r.cfg.Log,
		},
		root, tokenreview.New(tokenreview.Config{
			Reviews: r.clients.review.AuthenticationV1().TokenReviews(), Keys: tokenreview.JWKS(r.clients.keys.Discovery().RESTClient()), Log: r.cfg.Log,
		}),
		server.Config{Log: r.cfg.Log, OnEvent: metrics.NewXDS(r.registry).OnEvent}, nil)
}

// stopPatience bounds how long calls that are under way may take: certificates that are being signed.
const stopPatience = 5 * time.Second

// stop ends a gRPC server whose streams have ended.
func stop(g *grpc.Server) {
	hurry := time.AfterFunc(stopPatience, g.Stop)
	defer hurry.Stop()
	g.GracefulStop()
}
