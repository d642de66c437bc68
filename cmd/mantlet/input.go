package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/term"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// input holds the flags that simulate and sandbox share, and what they mean.
type input struct {
	files       []string
	namespace   string
	replicas    int
	injectAll   bool
	mtls        string
	trustDomain string
	ports       []string
	externals   []string
	output      string
	explain     int
}

func (in *input) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVarP(&in.files, "filename", "f", nil, "file or folder with manifests, - for standard input (repeatable)")
	f.StringVarP(&in.namespace, "namespace", "n", "default", "namespace of objects that name none")
	f.IntVar(&in.replicas, "replicas", 1, "pods per workload")
	f.BoolVar(&in.injectAll, "inject-all", false, "give every pod a sidecar, not only those in namespaces labelled "+policy.InjectLabel+"=enabled")
	f.StringVar(&in.mtls, "mtls", "permissive", "mode of namespaces without the label "+policy.ModeLabel+": permissive or strict")
	f.StringVar(&in.trustDomain, "trust-domain", "mantlet.local", "SPIFFE trust domain")
	f.StringArrayVar(&in.ports, "port", nil, "port to try beyond the declared ones, for example 80/TCP or 53/UDP (repeatable)")
	f.StringArrayVar(&in.externals, "external", nil, "range outside the cluster to try, CIDR[:port[/protocol]] (repeatable; 443/TCP if none is named)")
	f.StringVarP(&in.output, "output", "o", "table", "table, json or yaml")
	f.IntVar(&in.explain, "explain", 10, "how many denials the table explains")
}

// world is what the flags and manifests come to.
type world struct {
	manifests *source.Manifests
	config    policy.Config
	index     *policy.Index
	options   matrix.Options
	attempts  []matrix.Attempt
}

func (in *input) read(args []string, stderr io.Writer) (*world, error) {
	in.files = append(in.files, args...)
	if len(in.files) == 0 {
		return nil, errors.New("no manifests\n  hint: name files or folders with -f, for example -f examples/shop")
	}
	if !slices.Contains([]string{"table", "json", "yaml"}, in.output) {
		return nil, fmt.Errorf("--output %q: not table, json or yaml\n  hint: leave it out for a table", in.output)
	}
	if in.replicas < 1 || in.replicas > 1000 {
		return nil, fmt.Errorf("--replicas %d: want 1 to 1000\n  hint: give a number in that range", in.replicas)
	}
	if in.explain < 0 {
		return nil, fmt.Errorf("--explain %d: want 0 or more\n  hint: 0 explains nothing", in.explain)
	}
	td, err := spiffeid.TrustDomainFromString(in.trustDomain)
	if err != nil {
		return nil, fmt.Errorf("--trust-domain %q: %w\n  hint: a name such as mantlet.local, of lower-case letters, digits, dots, dashes and underscores", in.trustDomain, err)
	}
	mode, err := verdict.ParseMode(in.mtls)
	if err != nil {
		return nil, fmt.Errorf("--mtls: %w\n  hint: permissive accepts plaintext from pods without sidecar, strict does not", err)
	}
	w := &world{}
	for _, s := range in.ports {
		p, err := matrix.ParsePort(s)
		if err != nil {
			return nil, fmt.Errorf("--%w\n  hint: for example --port 80/TCP", err)
		}
		if p.Protocol == verdict.TCP && captured(p.Number) {
			return nil, fmt.Errorf("--port %s: this is where sidecars capture connections\n  hint: try another port", s)
		}
		w.options.Ports = append(w.options.Ports, p)
	}
	for _, s := range in.externals {
		e, err := matrix.ParseExternal(s)
		if err != nil {
			return nil, fmt.Errorf("--%w", err)
		}
		if e.Protocol == verdict.TCP && captured(e.Port) {
			return nil, fmt.Errorf("--external %s: port %d is where sidecars capture connections\n  hint: try another port", s, e.Port)
		}
		w.options.External = append(w.options.External, e)
	}
	if w.manifests, err = source.ReadManifests(in.files, source.Options{Replicas: in.replicas, Inject: in.scope(), Namespace: in.namespace}); err != nil {
		return nil, err
	}
	notice(stderr, w)
	w.config = policy.Config{TrustDomain: td, PodNetwork: w.manifests.PodNetwork, ServiceNetwork: w.manifests.ServiceNetwork, DefaultMode: mode}
	w.index = policy.NewIndex(w.config)
	if err := w.index.ApplyAll(&w.manifests.Objects); err != nil {
		return nil, err
	}
	if problems := w.index.Problems(); len(problems) > 0 {
		return nil, errors.New(strings.Join(problems, "\n"))
	}
	w.attempts, err = matrix.Plan(w.manifests, w.options)
	return w, err
}

// captured reports whether a TCP port is one of the sidecar's own: a pod cannot use it.
func captured(port uint16) bool { return port == names.InboundPort || port == names.OutboundPort }

func (in *input) scope() source.InjectScope {
	if in.injectAll {
		return source.InjectAll
	}
	return source.InjectLabeled
}

// notice tells what was left out.
func notice(stderr io.Writer, w *world) {
	m := w.manifests
	if len(m.Ignored) > 0 {
		var kinds []string
		for _, k := range slices.Sorted(maps.Keys(m.Ignored)) {
			kinds = append(kinds, fmt.Sprintf("%s (%d)", k, m.Ignored[k]))
		}
		fmt.Fprintf(stderr, "not read: %s\n", strings.Join(kinds, ", "))
	}
	for _, text := range m.Warnings {
		fmt.Fprintln(stderr, "warning:", text)
	}
}

func (in *input) write(out io.Writer, r *matrix.Report) error {
	switch in.output {
	case "json":
		return r.WriteJSON(out)
	case "yaml":
		return r.WriteYAML(out)
	}
	return r.WriteTable(out, palette(out), in.explain)
}

// palette is colour on a terminal, unless NO_COLOR is set (no-color.org).
func palette(out io.Writer) matrix.Palette {
	f, ok := out.(*os.File)
	if ok && term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" {
		return matrix.Colour
	}
	return matrix.Plain
}
