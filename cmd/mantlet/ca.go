package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/mantlet/mantlet/controlplane/authority"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/rotation"
	"github.com/mantlet/mantlet/controlplane/status/ask"
)

type caFlags struct {
	kubeconfig, output string
	wait               bool
	timeout, pause     time.Duration
	source             ask.Source
}

func newCA() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Show and rotate the root of a cluster's identities",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newCARotate(), newCAStatus())
	return cmd
}

func newCARotate() *cobra.Command {
	var f caFlags
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace the root, step by step, without a moment at which somebody refuses what somebody else shows",
		Long: `Rotate makes a new root and has the cluster go over to it: first both are trusted, then the new one signs, then it alone is trusted. A step is taken when
every replica, every namespace's trust bundle and every sidecar has the one before; sidecars get it with their next certificate (half of its validity at
most, 30 minutes unless the installation says otherwise), so that all of it takes about three times as long. A pod that never comes, on a node that is gone,
keeps the next step from being taken: delete it.

Without --wait it takes what steps can be taken now, and says what the next one waits for: run it again then. Whoever runs it goes on with what is under way,
wherever it was interrupted; several at once do no harm. It takes the rights of mantlet status, and to get and update the Secret with the root.

It exits with 0 where all steps are taken (with --wait: where every sidecar has the last), with 1 where it waits, and with 2 where it cannot go on or cannot tell.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return f.rotate(ctx, cmd.ErrOrStderr())
		},
	}
	f.add(cmd.Flags())
	cmd.Flags().BoolVar(&f.wait, "wait", false, "go through all steps, and wait until every sidecar trusts the new root alone")
	cmd.Flags().DurationVar(&f.timeout, "timeout", 0, "with --wait: how long; 0: as long as it takes")
	cmd.Flags().DurationVar(&f.pause, "pause", rotation.Pause, "the least time from one step to the next, in which webhook configurations and volumes follow")
	return cmd
}

func newCAStatus() *cobra.Command {
	var f caFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how far a rotation of the root is, and what it waits for",
		Long:  "Status exits with 0 where no rotation is under way and everybody has the roots, with 1 where something is behind, and with 2 where it cannot tell.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return f.status(ctx, cmd.OutOrStdout())
		},
	}
	f.add(cmd.Flags())
	cmd.Flags().StringVarP(&f.output, "output", "o", "table", "table or json")
	return cmd
}

func (f *caFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; without it $KUBECONFIG or ~/.kube/config")
	flags.StringVar(&f.source.Namespace, "system-namespace", names.SystemNamespace, "namespace of the control plane")
	flags.StringSliceVar(&f.source.Servers, "server", nil, "where replicas serve their reports, as http://127.0.0.1:15015 (repeatable); all of them have to be named")
}

// open is the rotation in the cluster that the flags name.
func (f *caFlags) open() (r rotation.Rotation, err error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = f.kubeconfig
	if f.source.API, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{}).ClientConfig(); err != nil {
		return r, fmt.Errorf("API server: %w\n  hint: name a file with --kubeconfig", err)
	}
	client, err := kubernetes.NewForConfig(f.source.API)
	if err != nil {
		return r, err
	}
	secret := authority.Secret{Client: client, Name: types.NamespacedName{Namespace: f.source.Namespace, Name: names.CASecret}, Log: slog.New(slog.DiscardHandler)}
	return rotation.Rotation{Secret: secret, Replicas: f.source, Pause: f.pause}, nil
}

func (f *caFlags) status(ctx context.Context, out io.Writer) error {
	if f.output != "table" && f.output != "json" {
		return &exit{cannotTell, fmt.Errorf("--output %s: unknown\n  hint: table or json", f.output)}
	}
	r, err := f.open()
	if err != nil {
		return &exit{cannotTell, err}
	}
	p, err := r.Look(ctx)
	if err != nil {
		return &exit{cannotTell, caHinted(err)}
	}
	if f.output == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		if err := e.Encode(p); err != nil {
			return err
		}
	} else {
		fmt.Fprintln(out, p.Text())
	}
	if !p.Complete() {
		return &exit{notEverywhere, errors.New("")}
	}
	return nil
}

// caHinted adds what helps against an error.
func caHinted(err error) error {
	if apierrors.IsForbidden(err) {
		return fmt.Errorf("%w\n  hint: ca takes the right to list pods, to create pods/portforward, and to get and update the secret %s in the control plane's namespace", err, names.CASecret)
	}
	return hinted(err)
}

// rotateAgain is between two looks while a step is waited for.
const rotateAgain = 2 * time.Second

// taken is what is said of the step that follows one.
var taken = map[authority.Step]string{
	authority.Settled:   "a new root is made, and step 1 of 3 is written",
	authority.Prepared:  "step 2 of 3 is written",
	authority.Activated: "step 3 of 3 is written",
}

var errInterrupted = &exit{notEverywhere, errors.New("the rotation is not complete; the step that was reached stays in force, which is no harm\n  hint: run it again, and it goes on from there")}

func (f *caFlags) rotate(ctx context.Context, progress io.Writer) error {
	r, err := f.open()
	if err != nil {
		return &exit{cannotTell, err}
	}
	if f.wait && f.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, f.timeout)
		defer cancel()
	}
	again := time.NewTicker(rotateAgain)
	defer again.Stop()
	for said, begun := "", false; ; {
		p, err := r.Look(ctx)
		var waits string
		switch {
		case ctx.Err() != nil:
			return errInterrupted
		case err != nil && begun && f.wait: // a replica restarts, or the API server does
			waits = err.Error()
		case err != nil:
			return &exit{cannotTell, caHinted(err)}
		case begun && p.Complete():
			fmt.Fprintln(progress, "the rotation is complete: every sidecar trusts the new root alone")
			return nil
		case begun && p.Step == authority.Settled:
			waits = "step 3 of 3, the new root alone is trusted: " + p.Missing()
			if !f.wait {
				fmt.Fprintln(progress, "sidecars follow with their next certificates (mantlet ca status tells)")
				return nil
			}
		default:
			begun = begun || p.Step != authority.Settled // by somebody before
			err := r.Advance(ctx, p)
			if err == nil {
				begun = true
				fmt.Fprintln(progress, taken[p.Step])
				continue
			}
			if !errors.Is(err, rotation.ErrWaits) {
				return &exit{cannotTell, caHinted(err)}
			}
			waits = err.Error()
		}
		if waits != said {
			said = waits
			fmt.Fprintln(progress, said)
		}
		if !f.wait {
			return &exit{notEverywhere, errors.New("the rotation waits\n  hint: run it again, or with --wait")}
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return errInterrupted
		}
	}
}
