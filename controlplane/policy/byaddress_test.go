package policy

import (
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"
)

// Each case is the spec of a NetworkPolicy, and the one place that is named.
func TestByAddress(t *testing.T) {
	for _, c := range []struct{ name, spec, want string }{
		{"no rule", `{}`, "<nil>"},
		{"TCP, and what is TCP by default", `ingress: [{from: [{podSelector: {}}], ports: [{port: 80}, {port: 80, protocol: TCP}]}]`, "<nil>"},
		{"no ports", `ingress: [{from: [{podSelector: {}}]}]`, "<nil>"},
		{"UDP", `ingress: [{from: [{podSelector: {}}], ports: [{port: 80}, {port: 53, protocol: UDP}]}]`, "spec.ingress[0].ports[1]"},
		{"SCTP, to namespaces", `egress: [{}, {to: [{namespaceSelector: {}}], ports: [{port: 53, protocol: SCTP}]}]`, "spec.egress[1].ports[0]"},
		{"the first of several", `
ingress: [{from: [{podSelector: {}}], ports: [{protocol: UDP}, {protocol: SCTP}]}]
egress: [{to: [{podSelector: {}}], ports: [{protocol: UDP}]}]`, "spec.ingress[0].ports[0]"},
		{"everybody", `egress: [{ports: [{port: 53, protocol: UDP}]}]`, "<nil>"},
		{"addresses alone", `egress: [{to: [{ipBlock: {cidr: 192.0.2.0/24}}], ports: [{port: 53, protocol: UDP}]}]`, "<nil>"},
		{"addresses, and pods", `egress: [{to: [{ipBlock: {cidr: 192.0.2.0/24}}, {podSelector: {}}], ports: [{port: 53, protocol: UDP}]}]`, "spec.egress[0].ports[0]"},
		{"a protocol that does not exist", `ingress: [{from: [{podSelector: {}}], ports: [{protocol: ICMP}]}]`, "<nil>"},
	} {
		var np networkingv1.NetworkPolicy
		if err := yaml.UnmarshalStrict([]byte(c.spec), &np.Spec); err != nil {
			t.Fatal(c.name, err)
		}
		if got := ByAddress(&np).String(); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
}
