package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/controlplane/status/ask"
)

// Exit codes of status.
const (
	notEverywhere = 1
	cannotTell    = 2
)

type statusFlags struct {
	kubeconfig, namespace, output, wait string
	timeout                             time.Duration
	source                              ask.Source
}

func newStatus() *cobra.Command {
	var f statusFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show where policy is in force in a cluster, and where not and why",
		Long: `Status asks every replica of the control plane, through the API server, what the sidecars have confirmed of what they were sent. It takes the right
to list pods and to create pods/portforward in the namespace of the control plane, and with --wait to get NetworkPolicies.

It exits with 0 where everything is in force, with 1 where something is not (a pod that a policy selects and that has no sidecar counts), and with
2 where it cannot tell. Pods of the node's network, and of namespaces whose pods get no sidecars (Mantlet's own, kube-system), do not count.`,
		Example: "  mantlet status -n shop\n  kubectl apply -f db.yaml && mantlet status --wait shop/db --timeout 30s",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return f.run(ctx, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&f.namespace, "namespace", "n", "", "only this namespace's policies and pods")
	flags.StringVarP(&f.output, "output", "o", "table", "table, wide (all sidecars) or json")
	flags.StringVar(&f.wait, "wait", "", "wait until this NetworkPolicy, [namespace/]name, is in force everywhere as it is in the API server now")
	flags.DurationVar(&f.timeout, "timeout", time.Minute, "with --wait: how long")
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; without it $KUBECONFIG or ~/.kube/config")
	flags.StringVar(&f.source.Namespace, "system-namespace", names.SystemNamespace, "namespace of the control plane")
	flags.StringSliceVar(&f.source.Servers, "server", nil, "where replicas serve their reports, as http://127.0.0.1:15015 (repeatable); the API server is not asked then, but with --kubeconfig for the policy to --wait for")
	return cmd
}

func (f *statusFlags) run(ctx context.Context, out, progress io.Writer) error {
	unable := func(err error) error { return &exit{cannotTell, err} }
	if f.output != "table" && f.output != "wide" && f.output != "json" {
		return unable(fmt.Errorf("--output %s: unknown\n  hint: table, wide or json", f.output))
	}
	if len(f.source.Servers) == 0 || f.kubeconfig != "" {
		rules := clientcmd.NewDefaultClientConfigLoadingRules()
		rules.ExplicitPath = f.kubeconfig
		var err error
		if f.source.API, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{}).ClientConfig(); err != nil {
			return unable(fmt.Errorf("API server: %w\n  hint: name a file with --kubeconfig", err))
		}
	}
	if f.wait != "" {
		return f.await(ctx, progress)
	}
	s, err := f.source.Status(ctx)
	if err != nil {
		return unable(hinted(err))
	}
	s = s.In(f.namespace)
	if err := f.show(out, s); err != nil {
		return err
	}
	return verdictOf(s.State)
}

// hinted adds what helps against an error.
func hinted(err error) error {
	switch {
	case errors.Is(err, ask.ErrNoReplica):
		return fmt.Errorf("%w\n  hint: mantlet install writes the manifests of one; --system-namespace says where it is", err)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%w\n  hint: status takes the right to list pods and to create pods/portforward in the control plane's namespace", err)
	}
	return err
}

func (f *statusFlags) show(out io.Writer, s status.Status) error {
	switch f.output {
	case "json":
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(s)
	case "wide":
		return s.Table(out, status.Everybody, time.Now())
	}
	return s.Table(out, status.Exceptions, time.Now())
}

// verdictOf is the exit code; the output has said why.
func verdictOf(s status.State) error {
	switch s {
	case status.InForce:
		return nil
	case status.Unknown:
		return &exit{cannotTell, errors.New("")}
	}
	return &exit{notEverywhere, errors.New("")}
}

// lookAgain is between two questions to all replicas while a policy is waited for.
const lookAgain = 200 * time.Millisecond

// await waits until a policy is in force in all pods that it selects.
func (f *statusFlags) await(ctx context.Context, progress io.Writer) error {
	name := f.wait
	if !strings.Contains(name, "/") && f.namespace != "" {
		name = f.namespace + "/" + name
	}
	if strings.Count(name, "/") != 1 || strings.HasPrefix(name, "/") || strings.HasSuffix(name, "/") {
		return &exit{cannotTell, fmt.Errorf("--wait %s: in which namespace?\n  hint: namespace/name, or with --namespace a name", f.wait)}
	}
	until := time.Now().Add(f.timeout)
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	wanted, err := f.wanted(ctx, name)
	if err != nil {
		return &exit{cannotTell, err}
	}
	return f.follow(ctx, until, f.source.Status, wanted, progress)
}

// follow looks again and again until a policy is in force or ctx ends, which it does at a time.
func (f *statusFlags) follow(ctx context.Context, until time.Time, look func(context.Context) (status.Status, error), wanted status.Policy, progress io.Writer) error {
	name := wanted.Name
	again := time.NewTicker(lookAgain)
	defer again.Stop()
	for said, found := "", (finding{}); ; {
		// A look that the end cut short says nothing. On a busy machine its error comes before ctx knows that the time is over.
		if s, err := look(ctx); ctx.Err() == nil && time.Now().Before(until) {
			found = find(s, err, wanted)
		}
		if found.text != said {
			said = found.text
			fmt.Fprintln(progress, said)
		}
		if found.state == status.InForce {
			return nil
		}
		if found.state == status.Refused || found.state == status.Exempt { // it stays so until somebody changes something
			return &exit{notEverywhere, errors.New("")}
		}
		select {
		case <-again.C:
			continue
		case <-ctx.Done():
		}
		code, why := notEverywhere, fmt.Sprintf("%s is not in force everywhere after %s", name, f.timeout)
		if found.state == status.Unknown {
			code, why = cannotTell, fmt.Sprintf("after %s it is not known whether %s is in force", f.timeout, name)
		}
		return &exit{code, errors.New(why)}
	}
}

// wanted is the version of the policy that is to be in force: that which the API server has or, where it is not asked, any.
func (f *statusFlags) wanted(ctx context.Context, name string) (status.Policy, error) {
	p := status.Policy{Name: name}
	if f.source.API == nil {
		return p, nil
	}
	client, err := kubernetes.NewForConfig(f.source.API)
	if err != nil {
		return p, err
	}
	namespace, short, _ := strings.Cut(name, "/")
	is, err := client.NetworkingV1().NetworkPolicies(namespace).Get(ctx, short, metav1.GetOptions{})
	if err != nil {
		return p, fmt.Errorf("--wait %s: %w", name, err)
	}
	p.UID, p.Generation = string(is.UID), is.Generation
	return p, nil
}

// finding is how far the policy is.
type finding struct {
	state status.State
	text  string
}

// find looks for a version of a policy, or a later one.
func find(s status.Status, err error, wanted status.Policy) finding {
	if err != nil {
		return finding{status.Unknown, err.Error()}
	}
	p, ok := s.Policy(wanted.Name)
	switch {
	case s.Heard() == 0:
		return finding{status.Unknown, "no replica answers: " + s.Replicas[0].Error}
	case !ok:
		return finding{status.NotEverywhere, wanted.Name + ": no replica has it yet"}
	case wanted.UID != "" && p.UID != wanted.UID || p.Generation < wanted.Generation:
		return finding{status.NotEverywhere, wanted.Name + ": the replicas have an older version"}
	}
	return finding{p.State, wanted.Name + ": " + p.Summary()}
}
