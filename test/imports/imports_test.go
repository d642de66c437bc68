// Package imports holds the rule of which room may know which: dependencies point one way, cmd → controlplane → xds → identity, and
// the agent stays small.
//
// The rule is a table. A package that is not in it, or that imports what its row does not name, fails the test: either the import is
// a mistake, or the row is to be changed, with the reason. Test files are exempt: they may bring rooms together.
package imports

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/mantlet/mantlet"

// room is one package and what it may know. Patterns are paths; "x/..." is x and everything below it.
type room struct {
	path  string   // relative to the module; the first row that fits holds
	rooms []string // Mantlet's packages that it may import
	only  []string // other modules that it may import; nil: any
	never []string // packages that must not get into it, not even through others
	pure  bool     // no files, sockets, processes
	why   string
}

const (
	spiffeID = "github.com/spiffe/go-spiffe/v2/spiffeid"
	envoyAPI = "github.com/envoyproxy/go-control-plane/..."
	grpc     = "google.golang.org/grpc/..."
	protobuf = "google.golang.org/protobuf/..."
)

var (
	kubernetes = []string{"k8s.io/...", "sigs.k8s.io/..."}
	everything = []string{"..."}
)

var table = []room{
	{path: "identity", rooms: nil, only: []string{spiffeID}, pure: true,
		why: "who a workload is depends on nothing; everybody depends on it"},
	{path: "identity/...", rooms: []string{"identity/...", "api/mantlet/v1"}, never: append([]string{envoyAPI}, kubernetes...),
		why: "identities outlive Envoy and Kubernetes, and the agent links them"},
	{path: "verdict", rooms: []string{"identity"}, only: []string{spiffeID, "github.com/gaissmai/bart/..."}, never: append([]string{envoyAPI, grpc}, kubernetes...), pure: true,
		why: "the compiled value is plain data, so that Envoy, nftables, simulation and the agent read the same"},
	{path: "verdict/wire", rooms: []string{"verdict", "api/mantlet/v1"}, only: []string{spiffeID, protobuf}, never: append([]string{envoyAPI}, kubernetes...), pure: true,
		why: "verdicts as bytes, for both ends; apart from verdict, which stays free of protobuf"},
	{path: "api/mantlet/v1", only: []string{grpc, protobuf},
		why: "generated from the protobuf files"},
	{path: "xds/names", only: []string{}, pure: true,
		why: "control plane, agent and Envoy agree on these names; it costs nobody anything"},
	{path: "xds/proxyuser", only: []string{}, pure: true,
		why: "who injects, the agent and the node's daemon agree on whom the redirect may exempt; who draws is not for it to say"},
	{path: "xds/server", rooms: []string{"xds/names"}, never: kubernetes,
		why: "delivers bytes and keeps the ledger; knows nothing of policy"},
	{path: "xds", rooms: []string{"verdict", "identity", "xds/names"}, never: append([]string{grpc}, kubernetes...), pure: true,
		why: "a pure function of verdicts: it must not be able to look anything up"},
	{path: "controlplane/policy", rooms: []string{"identity", "verdict"}, never: []string{envoyAPI, grpc, "k8s.io/client-go/..."}, pure: true,
		only: []string{spiffeID, "github.com/gaissmai/bart/...", "k8s.io/api/...", "k8s.io/apimachinery/..."},
		why:  "a pure function of objects: it never asks where they came from, nor what they become"},
	{path: "controlplane/inject/names", only: []string{}, pure: true,
		why: "whoever injects, watches and installs agree on these names; it costs nobody anything"},
	{path: "controlplane/inject/manifests", rooms: []string{"controlplane/inject"}, never: []string{envoyAPI, grpc, "k8s.io/client-go/..."}, pure: true,
		why: "texts in, texts out; who reads the files is the command"},
	{path: "controlplane/inject/webhook", rooms: []string{"controlplane/inject", "controlplane/inject/names", "controlplane/policy", "xds/proxyuser"}, never: []string{envoyAPI, grpc, "k8s.io/client-go/..."},
		why: "HTTPS around inject; what it asks of the API server are interfaces that client-go's clients have"},
	{path: "controlplane/inject", rooms: []string{"controlplane/inject/names", "controlplane/policy", "xds/names", "xds/proxyuser"}, never: []string{envoyAPI, grpc, "k8s.io/client-go/..."}, pure: true,
		only: []string{spiffeID, "k8s.io/api/...", "k8s.io/apimachinery/..."},
		why:  "a pure function of a pod and its namespace: webhook and command line are around it"},
	{path: "controlplane/source", rooms: []string{"controlplane/policy", "controlplane/inject/names", "verdict", "xds/names"}, never: []string{envoyAPI, grpc},
		why: "brings objects; what they mean is for policy to say"},
	{path: "controlplane/admission", rooms: []string{"controlplane/inject/...", "controlplane/settings", "identity/ca"}, never: []string{envoyAPI, grpc},
		why: "wires the webhooks of a replica: its authority, its client, its settings"},
	{path: "controlplane/settings", rooms: []string{"controlplane/inject", "controlplane/inject/names", "verdict"}, never: []string{envoyAPI, grpc, "k8s.io/client-go/..."}, pure: true,
		why: "the configuration file: what is read from it is for the command to wire"},
	{path: "controlplane/source/kube", rooms: []string{"controlplane/policy", "controlplane/inject/names"}, never: []string{envoyAPI, grpc},
		why: "brings objects as controlplane/source does, from an API server; to whom is an interface"},
	{path: "controlplane/tokenreview", rooms: []string{"identity/attest"}, never: []string{envoyAPI},
		why: "the Kubernetes side of attestation; identity links no Kubernetes"},
	{path: "controlplane/authority", rooms: []string{"controlplane/inject/names", "identity/ca"}, never: []string{envoyAPI, grpc},
		why: "keeps the authority in a cluster; what it signs is no matter"},
	{path: "controlplane/rotation", rooms: []string{"controlplane/authority", "controlplane/status", "identity/ca"}, never: []string{envoyAPI, grpc},
		why: "holds what replicas report against the Secret with the root; how they are asked is an interface"},
	{path: "controlplane/retired", rooms: []string{"controlplane/policy", "identity"}, never: []string{envoyAPI, grpc},
		why: "keeps what is retired in a cluster; what follows from it is for the control plane"},
	{path: "controlplane/metrics", rooms: []string{"xds/server"}, never: kubernetes,
		why: "shows what the ledger counts"},
	{path: "controlplane/status/ask", rooms: []string{"controlplane/status", "controlplane/inject/names"}, never: []string{envoyAPI, grpc},
		why: "the client of status: it brings reports, and says nothing of what they mean"},
	{path: "controlplane/status", only: []string{}, pure: true,
		why: "reports in, one status out; what the replica writes and the command reads"},
	{path: "controlplane/replica", rooms: []string{"controlplane", "controlplane/...", "identity/...", "verdict", "xds", "xds/server"},
		why: "joins the control plane with a cluster: the one room that knows both"},
	{path: "controlplane", rooms: []string{"controlplane/policy", "controlplane/inject/names", "controlplane/status", "identity/...", "verdict/...", "xds/...", "api/mantlet/v1"},
		why: "joins policy, xds and the server; does not care where objects come from, so not source; reports say which pods opted out, by the names of inject"},
	{path: "agent/podtest", only: []string{"github.com/vishvananda/...", "golang.org/x/sys/..."},
		why: "network namespaces for the tests of the agent's rooms"},
	{path: "agent/netfilter", rooms: []string{"xds/names", "xds/proxyuser", "verdict"}, never: append([]string{envoyAPI, grpc}, kubernetes...),
		why: "kernel only: the node mode uses it in other pods' namespaces"},
	{path: "agent/netfilter/packet", rooms: []string{"xds/names", "verdict", "agent/netfilter"}, never: append([]string{envoyAPI, grpc}, kubernetes...),
		why: "kernel only, like the redirect, and independent of it: two tables, two lives"},
	{path: "agent/hold", rooms: []string{"xds/names", "xds/proxyuser", "verdict", "agent/netfilter"}, never: append([]string{envoyAPI, grpc}, kubernetes...),
		why: "kernel only, as netfilter, whose guard looks after its table: who answers its questions is an interface"},
	{path: "agent/revoke", rooms: []string{"agent/flows", "agent/verdicts", "verdict", "xds/names"}, never: kubernetes,
		why: "open connections against verdicts; sock_diag only, so that the node mode can use it in other pods' namespaces"},
	{path: "agent/relay", rooms: []string{"xds/names", "identity/...", "api/mantlet/v1"}, never: append([]string{envoyAPI}, kubernetes...),
		why: "relays xDS as opaque bytes: a new Envoy API needs no new agent"},
	{path: "agent/envoy", rooms: []string{"xds/names", "xds/proxyuser"}, never: append([]string{grpc}, kubernetes...),
		why: "a process and its bootstrap; talks to Envoy through the other rooms only"},
	{path: "agent/...", rooms: []string{"agent/...", "api/mantlet/v1", "identity/...", "verdict/...", "xds/names", "xds/proxyuser"}, never: kubernetes,
		why: "one per pod: small and quick to start, so no Kubernetes library, and nothing of the control plane"},
	{path: "cmd/mantlet-agent", rooms: []string{"agent/...", "identity/...", "xds/names", "xds/proxyuser"}, never: kubernetes,
		why: "flags and wiring of the agent"},
	{path: "cmd/mantlet", rooms: []string{"controlplane/...", "sandbox/...", "identity/...", "verdict", "xds/...", "agent/netfilter", "install"},
		why: "flags and wiring; agents are started, not linked"},
	{path: "sandbox/netns", rooms: []string{"xds/names"}, never: append([]string{envoyAPI, grpc}, kubernetes...),
		why: "namespaces, links, probes: knows addresses, not policy"},
	{path: "sandbox/console", rooms: []string{"sandbox/netns"}, never: append([]string{envoyAPI, grpc}, kubernetes...),
		why: "brings a person's terminal into a pod; what the pod is for is no matter"},
	{path: "sandbox/matrix", rooms: []string{"controlplane/policy", "controlplane/source", "verdict", "xds/names"}, never: []string{envoyAPI, grpc},
		why: "who is asked about whom, and the answers side by side; the same for simulation and for real packets"},
	{path: "sandbox/...", rooms: []string{"sandbox/...", "controlplane/...", "identity/...", "verdict", "xds/...", "api/mantlet/v1", "agent/flows"},
		why: "a cluster on this machine: the real control plane, and real agents as processes, whose flows it reads"},
	{path: "examples/...", rooms: []string{"sandbox/matrix"},
		why: "writes down what the examples are expected to do"},
	{path: "test/oracle/matcher", rooms: []string{"xds/names"},
		why: "interprets what Envoy gets; shares no code with what renders it"},
	{path: "test/oracle", rooms: []string{"controlplane/policy", "verdict"}, never: []string{envoyAPI},
		why: "a second opinion: of policy and verdict it takes the data types only"},
	{path: "test/...", rooms: everything,
		why: "brings rooms together to try them"},
	{path: "install", rooms: []string{"controlplane/settings", "controlplane/inject/names"}, never: []string{envoyAPI, grpc, "k8s.io/client-go/..."}, pure: true,
		why: "values in, manifests out; it knows the control plane by its configuration file alone"},
	{path: "hack/...", rooms: everything,
		why: "for those who work on the project; ships nowhere"},
}

type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func TestImports(t *testing.T) {
	packages := list(t)
	for _, p := range packages {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		i := slices.IndexFunc(table, func(r room) bool { return fits(r.path, name) })
		if i < 0 {
			t.Errorf("%s is not in the table: give it a row, with what it may import and why", name)
			continue
		}
		for _, complaint := range table[i].check(p) {
			t.Errorf("%s %s\n  the rule: %s", name, complaint, table[i].why)
		}
	}
}

// check says what a package imports against its row.
func (r room) check(p listed) (complaints []string) {
	for _, im := range p.Imports {
		own, isOwn := strings.CutPrefix(im, module+"/")
		switch {
		case isOwn && !anyFits(r.rooms, own):
			complaints = append(complaints, "imports "+own)
		case !isOwn && strings.Contains(strings.Split(im, "/")[0], ".") && r.only != nil && !anyFits(r.only, im):
			complaints = append(complaints, "imports "+im)
		case r.pure && slices.Contains(impure, im):
			complaints = append(complaints, "imports "+im+", and is to be pure")
		}
	}
	for _, dep := range p.Deps {
		if anyFits(r.never, dep) {
			complaints = append(complaints, "links "+dep)
		}
	}
	return complaints
}

var impure = []string{"os", "os/exec", "os/signal", "net", "net/http", "syscall", "io/ioutil", "log", "log/slog", "math/rand", "math/rand/v2", "crypto/rand"}

func anyFits(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return fits(p, name) })
}

func fits(pattern, name string) bool {
	base, below := strings.CutSuffix(pattern, "...")
	if !below {
		return pattern == name
	}
	return strings.HasPrefix(name+"/", base)
}

func list(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", module+"/...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var packages []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
	if len(packages) < 10 {
		t.Fatalf("go list knows only %d packages", len(packages))
	}
	return packages
}

// The table itself: every row has a reason, and no row hides behind an earlier one.
func TestTable(t *testing.T) {
	for i, r := range table {
		if r.why == "" {
			t.Errorf("%s: no reason", r.path)
		}
		for _, earlier := range table[:i] {
			if fits(earlier.path, r.path) {
				t.Errorf("%s is never reached: %s goes before it", r.path, earlier.path)
			}
		}
	}
}

// The check finds what it is for.
func TestCheck(t *testing.T) {
	r := room{rooms: []string{"identity", "xds/..."}, only: []string{spiffeID}, never: kubernetes, pure: true}
	for _, c := range []struct {
		imports, deps []string
		want          int
	}{
		{[]string{"fmt", "net/netip", module + "/identity", module + "/xds", module + "/xds/names", spiffeID}, []string{"os", "net"}, 0},
		{[]string{module + "/identity/ca"}, nil, 1},
		{[]string{module + "/xdsx"}, nil, 1},
		{[]string{"example.com/x"}, nil, 1},
		{[]string{"os"}, nil, 1},
		{nil, []string{"k8s.io/api/core/v1", path.Join("sigs.k8s.io", "json"), "k8s.iox/y"}, 2},
	} {
		if got := r.check(listed{Imports: c.imports, Deps: c.deps}); len(got) != c.want {
			t.Errorf("imports %v, links %v: got %q, want %d complaints", c.imports, c.deps, got, c.want)
		}
	}
}
