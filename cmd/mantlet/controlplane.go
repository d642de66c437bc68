package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/replica"
	"github.com/mantlet/mantlet/controlplane/settings"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds"
)

// controlPlaneFlags are the flags of control-plane as they are written.
type controlPlaneFlags struct {
	kubeconfig, config, trustDomain, secret, mtls, resumption, nodePorts string
	podNetwork, serviceNetwork, nodeAddrs                                []string
	verbose                                                              bool
	cfg                                                                  replica.Config
}

func newControlPlane() *cobra.Command {
	var f controlPlaneFlags
	cmd := &cobra.Command{
		Use:   "control-plane",
		Short: "Run a replica of the control plane in a Kubernetes cluster",
		Long: `Control-plane watches a cluster, signs its pods' identities and keeps their sidecars supplied, until SIGTERM. Any number of replicas can
run: they share nothing but the cluster, and any serves any pod. After SIGTERM it serves on for --grace; a second one ends it at once.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := slog.LevelInfo
			if f.verbose {
				level = slog.LevelDebug
			}
			f.cfg.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			klog.SetSlogLogger(f.cfg.Log) // of the API's client
			if err := errors.Join(f.configured(cmd.Flags()), f.read()); err != nil {
				return err
			}
			controlplane.LimitGarbage()
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			defer context.AfterFunc(ctx, stop)() // a second signal ends the process at once
			return replica.Run(ctx, f.cfg)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; without it $KUBECONFIG, ~/.kube/config, or the pod's own ServiceAccount")
	flags.StringVar(&f.config, "config", "", "the settings of an installation (mantlet install writes them); with it pods are given sidecars")
	flags.StringVar(&f.cfg.Webhooks, "webhook-listen", fmt.Sprint(":", names.WebhookPort), "with --config: where the API server comes, as host:port")
	flags.StringVar(&f.trustDomain, "trust-domain", "mantlet.local", "SPIFFE trust domain")
	flags.StringVar(&f.cfg.Listen, "listen", fmt.Sprint(":", names.ServicePort), "where agents come, as host:port")
	flags.StringVar(&f.cfg.Health, "health", ":15014", "where /healthz, /readyz and /metrics are, as host:port")
	flags.StringVar(&f.cfg.Status, "status", fmt.Sprint("127.0.0.1:", names.StatusPort), "where mantlet status comes, as address:port of loopback; empty: nowhere")
	flags.StringVar(&f.secret, "ca-secret", names.SystemNamespace+"/"+names.CASecret, "namespace/name of the Secret with the root; it is made if it is not there")
	flags.StringSliceVar(&f.podNetwork, "pod-network", nil, "ranges of pod addresses beside the nodes' podCIDRs; best the whole cluster's, or each new node has all policy compiled anew")
	flags.StringSliceVar(&f.serviceNetwork, "service-network", nil, "ranges of Service addresses; without it those of the cluster's ServiceCIDRs (Kubernetes 1.33)")
	flags.StringSliceVar(&f.nodeAddrs, "node-address", nil, "addresses from which kubelets reach their pods, beside InternalIPs and the first of the podCIDRs")
	flags.StringVar(&f.nodePorts, "node-ports", verdict.DefaultNodePorts.String(), "the API server's --service-node-port-range")
	flags.StringVar(&f.mtls, "mtls", "permissive", "mode of namespaces without the label "+policy.ModeLabel+": permissive or strict")
	flags.StringVar(&f.resumption, "resumption", "on", "whether sidecars resume TLS sessions: on or off")
	flags.DurationVar(&f.cfg.TTL, "svid-ttl", ca.DefaultTTL, "how long pods' certificates are valid; they are renewed at half of it")
	flags.DurationVar(&f.cfg.Grace, "grace", replica.Grace, "how long to go on serving after SIGTERM, not ready any more, while sidecars and the API server go to other replicas")
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "log each configuration that a sidecar is sent")
	return cmd
}

// configured takes over what --config says, in the place of flags. It refuses a flag beside it that says the same thing.
func (f *controlPlaneFlags) configured(flags *pflag.FlagSet) error {
	if f.config == "" {
		return nil
	}
	text, err := os.ReadFile(f.config)
	if err != nil {
		return fmt.Errorf("--config: %w", err)
	}
	s, err := settings.Read(text)
	if err != nil {
		return fmt.Errorf("--config %s: %w", f.config, err)
	}
	for _, name := range []string{"trust-domain", "mtls", "ca-secret", "pod-network", "service-network", "node-address", "node-ports"} {
		if flags.Changed(name) {
			return fmt.Errorf("--%s: it is in %s\n  hint: change it there, or leave --config out", name, f.config)
		}
	}
	f.cfg.Settings, f.trustDomain, f.secret = s, s.TrustDomain, s.Namespace+"/"+names.CASecret
	f.podNetwork, f.serviceNetwork, f.nodeAddrs = s.PodNetworks, s.ServiceNetworks, s.NodeAddresses
	if s.NodePorts != "" {
		f.nodePorts = s.NodePorts
	}
	if s.MTLS != "" {
		f.mtls = s.MTLS
	}
	return nil
}

// read reads what the flags say.
func (f *controlPlaneFlags) read() (err error) {
	c := &f.cfg
	if c.TrustDomain, err = spiffeid.TrustDomainFromString(f.trustDomain); err != nil {
		return fmt.Errorf("--trust-domain %q: %w\n  hint: a name such as mantlet.local, of lower-case letters, digits, dots, dashes and underscores", f.trustDomain, err)
	}
	namespace, name, ok := strings.Cut(f.secret, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("--ca-secret %q: not of the form namespace/name\n  hint: for example %s/%s", f.secret, names.SystemNamespace, names.CASecret)
	}
	c.Secret = types.NamespacedName{Namespace: namespace, Name: name}
	c.Exempt = []string{metav1.NamespaceSystem, namespace}
	if c.Settings != nil {
		c.Exempt = append(c.Exempt, c.Settings.SystemNamespaces...)
	}
	if c.Networks.Pods, err = prefixes("pod-network", f.podNetwork); err != nil {
		return err
	}
	if c.Networks.Services, err = prefixes("service-network", f.serviceNetwork); err != nil {
		return err
	}
	for _, s := range f.nodeAddrs {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return fmt.Errorf("--node-address %s: %w\n  hint: an address such as 169.254.1.1, without a prefix length", s, err)
		}
		c.NodeAddrs = append(c.NodeAddrs, a.Unmap())
	}
	if c.NodePorts, err = verdict.ParsePortRange(f.nodePorts); err != nil {
		return fmt.Errorf("--node-ports: %w\n  hint: the API server's --service-node-port-range, with both ends", err)
	}
	if c.Mode, err = verdict.ParseMode(f.mtls); err != nil {
		return fmt.Errorf("--mtls: %w\n  hint: permissive accepts plaintext from pods without sidecar, strict does not", err)
	}
	if c.Sessions, err = xds.ParseResumption(f.resumption); err != nil {
		return fmt.Errorf("--%w", err)
	}
	if c.TTL < time.Minute {
		return fmt.Errorf("--svid-ttl %s: less than a minute\n  hint: certificates are renewed at half of it", c.TTL)
	}
	if c.Grace < 0 {
		return fmt.Errorf("--grace %s: negative\n  hint: 0s ends at once", c.Grace)
	}
	if c.Name, err = os.Hostname(); err != nil { // a pod's name, in a pod
		return err
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = f.kubeconfig
	if c.API, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{}).ClientConfig(); err != nil {
		return fmt.Errorf("API server: %w\n  hint: outside of a pod name a file with --kubeconfig", err)
	}
	return nil
}

func prefixes(flag string, list []string) (out []netip.Prefix, err error) {
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("--%s %s: not a range of addresses\n  hint: for example 10.244.0.0/16", flag, s)
		}
		out = append(out, p)
	}
	return out, nil
}
