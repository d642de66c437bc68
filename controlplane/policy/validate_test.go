package policy

import (
	"slices"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// Each case is the body of a NetworkPolicy, and the fields that are wrong in it.
func TestValidate(t *testing.T) {
	for _, c := range []struct {
		name, yaml string
		want       []string
	}{
		{"the smallest", `spec: {}`, nil},
		{"everything that is allowed", `
spec:
  podSelector: {matchLabels: {app: db}, matchExpressions: [{key: tier, operator: In, values: [a, b]}, {key: old, operator: DoesNotExist}]}
  policyTypes: [Ingress, Egress]
  ingress:
  - {}
  - from: []
    ports: []
  - from: [{podSelector: {}}, {namespaceSelector: {}}, {podSelector: {}, namespaceSelector: {}}, {ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 10.2.3.4/32]}}]
    ports: [{}, {protocol: UDP}, {port: 1}, {port: 65535}, {port: 1, endPort: 65535}, {port: 80, endPort: 80}, {port: http}, {port: a-15-long-name1, protocol: SCTP}]
  egress:
  - to: [{ipBlock: {cidr: "::/0", except: ["fd00::/8"]}}, {ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: 10.1.2.3/8}}]
`, nil},
		{"selector operator", `spec: {podSelector: {matchExpressions: [{key: a, operator: Is, values: [b]}]}}`, []string{"spec.podSelector.matchExpressions[0].operator"}},
		{"In without values", `spec: {podSelector: {matchExpressions: [{key: a, operator: In}]}}`, []string{"spec.podSelector.matchExpressions[0].values"}},
		{"Exists with values", `spec: {podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}`, []string{"spec.podSelector.matchExpressions[0].values"}},
		{"label key", `spec: {podSelector: {matchLabels: {"a b": c}}}`, []string{"spec.podSelector.matchLabels"}},
		{"label value in a peer", `spec: {ingress: [{from: [{podSelector: {matchLabels: {a: "b c"}}}]}]}`, []string{"spec.ingress[0].from[0].podSelector.matchLabels"}},
		{"namespaceSelector of an egress peer", `spec: {egress: [{}, {to: [{namespaceSelector: {matchExpressions: [{key: a, operator: NotIn}]}}]}]}`,
			[]string{"spec.egress[1].to[0].namespaceSelector.matchExpressions[0].values"}},
		{"empty peer", `spec: {ingress: [{from: [{}]}]}`, []string{"spec.ingress[0].from[0]"}},
		{"ipBlock beside podSelector", `spec: {ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}`, []string{"spec.ingress[0].from[0]"}},
		{"ipBlock beside namespaceSelector", `spec: {egress: [{to: [{namespaceSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}`, []string{"spec.egress[0].to[0]"}},
		{"no cidr", `spec: {ingress: [{from: [{ipBlock: {except: [10.0.0.0/8]}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.cidr"}},
		{"an address is no cidr", `spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.1}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.cidr"}},
		{"prefix too long", `spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.cidr"}},
		{"leading zeros", `spec: {ingress: [{from: [{ipBlock: {cidr: 010.0.0.0/8}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.cidr"}},
		{"IPv4-mapped", `spec: {ingress: [{from: [{ipBlock: {cidr: "::ffff:10.0.0.0/104"}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.cidr"}},
		{"except is no cidr", `spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, x]}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.except[1]"}},
		{"except outside", `spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.except[0]"}},
		{"except equals cidr", `spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.except[0]"}},
		{"except wider", `spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/7]}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.except[0]"}},
		{"except of the other family", `spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ["fd00::/8"]}}]}]}`, []string{"spec.ingress[0].from[0].ipBlock.except[0]"}},
		{"port 0", `spec: {ingress: [{ports: [{port: 0}]}]}`, []string{"spec.ingress[0].ports[0].port"}},
		{"port too large", `spec: {ingress: [{ports: [{port: 80}, {port: 65536}]}]}`, []string{"spec.ingress[0].ports[1].port"}},
		{"port negative", `spec: {egress: [{ports: [{port: -1}]}]}`, []string{"spec.egress[0].ports[0].port"}},
		{"port name", `spec: {egress: [{ports: [{port: not_a_name}]}]}`, []string{"spec.egress[0].ports[0].port"}},
		{"port name empty", `spec: {egress: [{ports: [{port: ""}]}]}`, []string{"spec.egress[0].ports[0].port", "spec.egress[0].ports[0].port"}},
		{"number in quotes is a name, and no good one", `spec: {egress: [{ports: [{port: "80"}]}]}`, []string{"spec.egress[0].ports[0].port"}},
		{"endPort without port", `spec: {ingress: [{ports: [{endPort: 90}]}]}`, []string{"spec.ingress[0].ports[0].endPort"}},
		{"endPort of a named port", `spec: {ingress: [{ports: [{port: http, endPort: 90}]}]}`, []string{"spec.ingress[0].ports[0].endPort"}},
		{"endPort before port", `spec: {ingress: [{ports: [{port: 90, endPort: 80}]}]}`, []string{"spec.ingress[0].ports[0].endPort"}},
		{"endPort too large", `spec: {ingress: [{ports: [{port: 90, endPort: 65536}]}]}`, []string{"spec.ingress[0].ports[0].endPort"}},
		{"protocol", `spec: {ingress: [{ports: [{protocol: tcp, port: 80}]}]}`, []string{"spec.ingress[0].ports[0].protocol"}},
		{"protocol empty", `spec: {ingress: [{ports: [{protocol: ""}]}]}`, []string{"spec.ingress[0].ports[0].protocol"}},
		{"policy type", `spec: {policyTypes: [Ingress, ingress]}`, []string{"spec.policyTypes[1]"}},
		{"three policy types", `spec: {policyTypes: [Ingress, Egress, Ingress]}`, []string{"spec.policyTypes"}},
		{"audit", `{metadata: {annotations: {mantlet.dev/mode: audit}}}`, []string{"metadata.annotations[mantlet.dev/mode]"}},
		{"enforce too", `{metadata: {annotations: {mantlet.dev/mode: ""}}}`, []string{"metadata.annotations[mantlet.dev/mode]"}},
		{"rules of a direction that is not isolated count too", `spec: {policyTypes: [Ingress], egress: [{ports: [{port: 0}]}]}`, []string{"spec.egress[0].ports[0].port"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			np := networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}}
			if err := yaml.UnmarshalStrict([]byte(c.yaml), &np); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, e := range Validate(&np) {
				got = append(got, e.Field)
				if e.Detail == "" && e.BadValue == nil {
					t.Errorf("%s: says not what is wrong", e.Field)
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q\n%v", got, c.want, Validate(&np).ToAggregate())
			}
		})
	}
}
