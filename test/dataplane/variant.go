package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// path is what stands between the apps of a variant.
type path int

const (
	direct     path = iota // nothing
	plaintext              // an Envoy at each end
	linear                 // the same with mTLS and, at the server, a list of principals that Envoy goes through one by one
	permissive             // Mantlet's sidecars, in a permissive namespace
	strict                 // the same, in a strict one
)

// variant is one way from an app to another.
type variant struct {
	name     string
	path     path
	admitted int    // how many identities the server's policy admits, the client's among them; 0: nobody asks
	curves   string // for the key exchange of a linear pair; "": Envoy's own choice, which Mantlet leaves as it is
}

// The variants that others are held against.
const (
	rawTCP    = "raw"
	plainPair = "plaintext"
	linearOne = "linear-1"
	// classicOne is linearOne without the post-quantum half of the key exchange.
	classicOne = "linear-1-x25519"
	strictOne  = "strict-1"
)

var variants = []variant{
	{name: rawTCP, path: direct},
	{name: plainPair, path: plaintext},
	{name: classicOne, path: linear, admitted: 1, curves: "X25519"},
	{name: linearOne, path: linear, admitted: 1},
	{name: "linear-100", path: linear, admitted: 100},
	{name: "linear-10000", path: linear, admitted: 10_000},
	{name: "permissive-1", path: permissive, admitted: 1},
	{name: strictOne, path: strict, admitted: 1},
	{name: "strict-100", path: strict, admitted: 100},
	{name: "strict-10000", path: strict, admitted: 10_000},
}

// choose picks variants by name, in their own order; "" is all.
func choose(list string) ([]variant, error) {
	if list == "" {
		return variants, nil
	}
	wanted := strings.Split(list, ",")
	var out []variant
	var known []string
	for _, v := range variants {
		known = append(known, v.name)
		if slices.Contains(wanted, v.name) {
			out = append(out, v)
		}
	}
	for _, w := range wanted {
		if !slices.Contains(known, w) {
			return nil, fmt.Errorf("-variants: there is no %q\n  hint: there are %s", w, strings.Join(known, ", "))
		}
	}
	return out, nil
}

// namespace is where the pods of a variant are.
func (v variant) namespace() string {
	return map[path]string{direct: "bare", plaintext: "bare", linear: "bare", permissive: "permissive", strict: "strict"}[v.path]
}

func (v variant) client() string { return v.namespace() + "/" + v.name + "-client" }
func (v variant) server() string { return v.namespace() + "/" + v.name + "-server" }

const namespaces = `
{apiVersion: v1, kind: Namespace, metadata: {name: bare}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: permissive, labels: {mantlet.dev/inject: enabled, mantlet.dev/mtls: permissive}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: strict, labels: {mantlet.dev/inject: enabled, mantlet.dev/mtls: strict}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: crowd, labels: {mantlet.dev/inject: enabled, mantlet.dev/mtls: permissive}}}
`

// crowdLabel numbers the pods of the namespace crowd: each is an identity of its own. They exist in the control plane's eyes only.
// Those of a lower number than the largest crowd's carry the label of each crowd that they belong to.
const crowdLabel = "number"

func crowdOf(admitted int) string { return "among-" + strconv.Itoa(admitted) }

// manifests are the pods of a variant and the policy of its server: it admits the client and so many of the crowd that there are as many
// identities as the variant says.
func (v variant) manifests() string {
	var b strings.Builder
	for _, end := range []string{"client", "server"} {
		fmt.Fprintf(&b, "---\n{apiVersion: v1, kind: Pod, metadata: {name: %[1]s-%[2]s, namespace: %[3]s, labels: {app: %[1]s-%[2]s}}, spec: {containers: [{name: c, image: i}]}}\n",
			v.name, end, v.namespace())
	}
	if v.path < permissive {
		return b.String()
	}
	from := fmt.Sprintf("{podSelector: {matchLabels: {app: %s-client}}}", v.name)
	if v.admitted > 1 {
		from += fmt.Sprintf(", {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: crowd}}, podSelector: {matchLabels: {%s: \"yes\"}}}", crowdOf(v.admitted))
	}
	fmt.Fprintf(&b, `---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: %[1]s, namespace: %[2]s}
spec: {podSelector: {matchLabels: {app: %[1]s-server}}, ingress: [{from: [%[3]s]}]}
`, v.name, v.namespace(), from)
	return b.String()
}
