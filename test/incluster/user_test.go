package incluster

import (
	"strings"
	"testing"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// denyEgress isolates pods app=name for egress, and admits nothing. What they connect to is not isolated: their own sidecars alone keep them from it.
func denyEgress(name string) string {
	return `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: ` + name + `}
spec: {podSelector: {matchLabels: {app: ` + name + `}}, policyTypes: [Egress]}
`
}

// An image that names the user of a sidecar does not get past its own: which user that is nobody could know. In node mode the namespace is at Pod
// Security's level restricted, where a pod can become nobody else.
func TestImageThatNamesAUser(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	labels, context := []string{"mantlet.dev/inject=enabled"}, ""
	if w.Capture == inject.CaptureNode {
		labels = append(labels, "pod-security.kubernetes.io/enforce=restricted")
		context = ", securityContext: {runAsNonRoot: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}"
	}
	p := newPlace(t, w, "claims", labels...)
	claims := strings.Replace(strings.Replace(client("claims", ""), "CLIENT", "CLAIMS", 1), "args: [pause]", "args: [pause]"+context, 1)
	other := strings.Replace(claims, "name: claims, labels: {app: claims}", "name: free, labels: {app: free}", 1)
	api := strings.Replace(server("api", 1), "SERVE}", "SERVE"+strings.Replace(context, "runAsNonRoot: true", "runAsNonRoot: true, runAsUser: 1000", 1)+"}", 1)
	p.apply(denyEgress("claims"), api, claims, other)
	p.ready("deployment/api", "pod/claims", "pod/free")
	p.inForce("claims")
	p.want("without a policy", "free", traffic.Reached, p.direct("api"), p.service("api"))
	p.want("as USER 15150", "claims", traffic.Refused, p.direct("api"), p.service("api"))
	if w.Capture == inject.CaptureNode {
		a, b := p.pod("claims").Spec.InitContainers[0].SecurityContext, p.pod("free").Spec.InitContainers[0].SecurityContext
		t.Logf("sidecars: user %d, group %d, and user %d, group %d", *a.RunAsUser, *a.RunAsGroup, *b.RunAsUser, *b.RunAsGroup)
		if *a.RunAsUser == *b.RunAsUser || *a.RunAsGroup == *b.RunAsGroup {
			t.Error("two sidecars share their user or their group")
		}
	}
}

// In a pod with users of its own, of which there are few, Envoy is one of these, and its redirect lets it pass. Node mode refuses such pods: the daemon
// could not tell their sidecars.
func TestPodWithOwnUsers(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "enclosed")
	if w.Capture == inject.CaptureNode {
		p.wantRefused("users of its own", client("free", "hostUsers: false, "), "spec.hostUsers: in node mode a pod with users of its own would not start")
		return
	}
	claims := strings.Replace(client("claims", "hostUsers: false, "), "CLIENT", "CLAIMS", 1)
	p.apply(denyEgress("claims"), server("api", 1), claims, client("free", "hostUsers: false, "))
	p.ready("deployment/api", "pod/claims", "pod/free")
	p.inForce("claims")
	p.want("without a policy", "free", traffic.Reached, p.direct("api"), p.service("api"))
	p.want("as USER 15150", "claims", traffic.Refused, p.direct("api"), p.service("api"))
}
