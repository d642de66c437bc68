package webhook

import (
	"net/http"
	"slices"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
)

// TestPolicyWarnings: a policy is never refused, and whoever writes it is told all that is not enforced as it is written.
func TestPolicyWarnings(t *testing.T) {
	s, _ := newServer(t)
	unknown := func(path string) string {
		return "mantlet does not know field " + path + " and cannot enforce it: the policy counts as if it were not there, and may admit more than it says"
	}
	const nobody = "mantlet cannot enforce this as written, and admits nobody by it: "
	const byAddress = "mantlet enforces rules over UDP and SCTP by the peer's address, which is not authenticated: "
	const needs = "Required value: a peer needs podSelector, namespaceSelector or ipBlock; to admit everybody leave the whole list out"
	for name, c := range map[string]struct {
		object string
		want   []string
	}{
		"all is enforced":    {`{"metadata":{"name":"p"},"spec":{"podSelector":{},"ingress":[{"from":[{"podSelector":{}}],"ports":[{"port":80}]}]}}`, nil},
		"a field of a spec":  {`{"spec":{"podSelector":{},"next":1}}`, []string{unknown("spec.next")}},
		"a field of a rule":  {`{"spec":{"podSelector":{},"ingress":[{},{"action":"Deny"}]}}`, []string{unknown("spec.ingress[1].action")}},
		"a field of a port":  {`{"spec":{"egress":[{"ports":[{"port":80,"method":"GET"}]}]}}`, []string{unknown("spec.egress[0].ports[0].method")}},
		"a field of a block": {`{"spec":{"egress":[{"to":[{"ipBlock":{"cidr":"192.0.2.0/24","zone":"a"}}]}]}}`, []string{unknown("spec.egress[0].to[0].ipBlock.zone")}},
		"beside what is known": {`{"spec":{"ingress":[{"from":[{"podSelector":{},"serviceAccounts":{}}]}]}}`,
			[]string{unknown("spec.ingress[0].from[0].serviceAccounts")}},
		"alone: nobody is admitted": {`{"spec":{"ingress":[{"from":[{"nodes":{}}]}]}}`,
			[]string{unknown("spec.ingress[0].from[0].nodes"), nobody + "spec.ingress[0].from[0]: " + needs}},
		"several":                    {`{"spec":{"a":1,"b":{"c":1}},"data":1}`, []string{unknown("spec.a"), unknown("spec.b"), unknown("data")}},
		"in another case":            {`{"spec":{"Ingress":[]}}`, []string{unknown("spec.Ingress")}},
		"what decides about nothing": {`{"metadata":{"next":1,"managedFields":[{"fieldsV1":{"f:spec":{}}}]},"spec":{},"status":{"conditions":[]}}`, nil},
		"UDP, told once":             {`{"spec":{"egress":[{"to":[{"podSelector":{}}],"ports":[{"protocol":"UDP"},{"protocol":"SCTP"}]}]}}`, []string{byAddress + "spec.egress[0].ports[0]"}},
		"UDP, to everybody":          {`{"spec":{"egress":[{"ports":[{"protocol":"UDP"}]}]}}`, nil},
		"what no API server accepts": {`{"spec":{"policyTypes":["Both"]}}`, []string{nobody + `spec.policyTypes[0]: Unsupported value: "Both": supported values: "Egress", "Ingress"`}},
	} {
		for _, op := range []admissionv1.Operation{admissionv1.Create, admissionv1.Update} {
			code, answer := post(t, s, PathPolicy, "application/json", review(op, "NetworkPolicy", "shop", c.object))
			if code != http.StatusOK || !answer.Allowed {
				t.Errorf("%s, %s: status %d, %+v", name, op, code, answer)
				continue
			}
			slices.Sort(answer.Warnings)
			slices.Sort(c.want)
			if !slices.Equal(answer.Warnings, c.want) {
				t.Errorf("%s, %s: got\n%q\nwant\n%q", name, op, answer.Warnings, c.want)
			}
			for _, w := range answer.Warnings {
				if len(w) > 256 { // "Individual warning messages over 256 characters may be truncated by the API server" (Dynamic Admission Control)
					t.Errorf("%s: of %d characters: %s", name, len(w), w)
				}
			}
		}
	}
}
