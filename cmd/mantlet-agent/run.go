package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/agent"
	"github.com/mantlet/mantlet/agent/envoy"
)

// runFlags are the flags of run as they are written.
type runFlags struct {
	trustDomain, bundle, token, flows, exempt, capture string
	verbose                                            bool
	cfg                                                agent.Config
}

func runCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the agent of this pod until SIGTERM",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			cfg, closeFlows, err := f.config()
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeFlows()) }()
			useProcessors(cfg.Concurrency) // as many as Envoy
			return agent.Run(cmd.Context(), cfg)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.cfg.Pod, "pod", "", "this pod, as namespace/name; without it $POD_NAMESPACE/$POD_NAME")
	flags.StringVar(&f.cfg.ControlPlane, "control-plane", "", "address of the control plane, as host:port")
	flags.StringVar(&f.trustDomain, "trust-domain", "", "SPIFFE trust domain")
	flags.StringVar(&f.bundle, "bundle", "", "file with the trust domain's root certificates, PEM; read again when the control plane cannot be verified")
	flags.StringVar(&f.token, "token-file", "", "file with this pod's token; read again each time")
	flags.StringVar(&f.cfg.Envoy, "envoy", "envoy", "the Envoy binary")
	flags.StringVar(&f.cfg.RunDir, "run-dir", "", "folder for sockets; made if it is not there")
	flags.StringVar(&f.flows, "flows", "-", "file to append flow records to, or - for stdout")
	flags.IntVar(&f.cfg.Concurrency, "concurrency", 1, "Envoy's worker threads")
	flags.StringVar(&f.exempt, "exempt", "", "how the redirect tells Envoy's own connections: uid (Envoy has a user of its own; the default), mark (it shares the agent's), or agent (both have that user and no privileges; the default with --capture node)")
	flags.DurationVar(&f.cfg.DrainTimeout, "drain-timeout", 5*time.Second, "how long open connections may live on after SIGTERM")
	flags.DurationVar(&f.cfg.RenewAfter, "renew-after", 0, "renew the certificate at this age, if that is before half of its validity is over; 0: never earlier")
	flags.DurationVar(&f.cfg.SessionBound, "session-bound", 10*time.Minute, "how long TLS sessions with this pod may be resumed, which is how long an expired certificate may be accepted at most")
	flags.StringVar(&f.capture, "capture", string(agent.CaptureSelf), "who redirects the pod's traffic to Envoy: redirect (this process) or node (mantlet-agent node, in the pod's network namespace)")
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "log each configuration that Envoy accepts")
	for _, name := range []string{"control-plane", "trust-domain", "bundle", "token-file", "run-dir"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // a name that is not a flag
		}
	}
	return cmd
}

// config reads what the flags name. The function closes the flows' file.
func (f *runFlags) config() (agent.Config, func() error, error) {
	cfg := f.cfg
	level := slog.LevelInfo
	if f.verbose {
		level = slog.LevelDebug
	}
	if cfg.Pod == "" {
		namespace, name := os.Getenv("POD_NAMESPACE"), os.Getenv("POD_NAME") // by the downward API
		if namespace == "" || name == "" {
			return cfg, nil, errors.New("which pod this is must be said: --pod namespace/name, or $POD_NAMESPACE and $POD_NAME")
		}
		cfg.Pod = namespace + "/" + name
	}
	cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	cfg.EnvoyLog = os.Stderr
	cfg.Capture, cfg.Exempt = agent.Capture(f.capture), envoy.Privilege(f.exempt)
	var err error
	if cfg.TrustDomain, err = spiffeid.TrustDomainFromString(f.trustDomain); err != nil {
		return cfg, nil, fmt.Errorf("--trust-domain %s: %w", f.trustDomain, err)
	}
	cfg.Reread = func() (*x509bundle.Bundle, error) { return x509bundle.Load(cfg.TrustDomain, f.bundle) }
	if cfg.Bundle, err = cfg.Reread(); err != nil {
		return cfg, nil, fmt.Errorf("--bundle %s: %w", f.bundle, err)
	}
	cfg.Token = func() (string, error) {
		b, err := os.ReadFile(f.token)
		return string(b), err
	}
	if _, err := cfg.Token(); err != nil {
		return cfg, nil, fmt.Errorf("--token-file: %w", err)
	}
	out, closeFlows, err := openFlows(f.flows)
	if err != nil {
		return cfg, nil, fmt.Errorf("--flows: %w", err)
	}
	cfg.Flows = out
	return cfg, closeFlows, nil
}

func openFlows(path string) (io.Writer, func() error, error) {
	if path == "-" {
		return os.Stdout, func() error { return nil }, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return nil, nil, err
	}
	return f, f.Close, nil
}
