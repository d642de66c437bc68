package oracle

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
)

// shop is the cluster of all cases below: two namespaces, pods with a sidecar unless they are called old, host or far.
func shop(t *testing.T, policies string) World {
	t.Helper()
	w := World{PodNetwork: podNetwork, Mode: verdict.Permissive}
	for _, ns := range []string{"shop", "team", "strict"} {
		o := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: map[string]string{"name": ns}}}
		if ns == "strict" {
			o.Labels[policy.ModeLabel] = "strict"
		}
		w.Objects.Namespaces = append(w.Objects.Namespaces, o)
	}
	always := corev1.ContainerRestartPolicyAlways
	for i, name := range []string{"shop/web", "shop/api", "shop/db", "shop/old", "team/api", "team/old", "strict/api", "strict/db", "team/host", "team/far"} {
		ns, app, _ := strings.Cut(name, "/")
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: app, Labels: map[string]string{"app": app}}}
		p.Status.PodIPs = []corev1.PodIP{{IP: fmt.Sprintf("10.64.0.%d", 10+i)}, {IP: fmt.Sprintf("fd00:10:64::%d", 10+i)}}
		p.Status.HostIPs = []corev1.HostIP{{IP: "10.64.0.1"}, {IP: "fd00:10:64::1"}}
		if app == "host" {
			p.Spec.HostNetwork = true
			p.Status.PodIPs = []corev1.PodIP{{IP: "172.18.0.3"}}
			p.Status.HostIPs = []corev1.HostIP{{IP: "172.18.0.3"}}
		}
		if app == "far" { // from a second range that nobody named as pod network
			p.Status.PodIPs = []corev1.PodIP{{IP: "192.0.2.5"}}
		}
		if app != "old" && app != "host" && app != "far" {
			p.Annotations = map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}
		}
		if app == "db" {
			p.Spec.Containers = []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "sql", ContainerPort: 5432}, {Name: "sync", ContainerPort: 700, Protocol: "SCTP"}}}}
			p.Spec.InitContainers = []corev1.Container{
				{Ports: []corev1.ContainerPort{{Name: "metrics", ContainerPort: 9000}}, RestartPolicy: &always},
				{Ports: []corev1.ContainerPort{{Name: "metrics", ContainerPort: 9001}}},
			}
		}
		w.Objects.Pods = append(w.Objects.Pods, p)
	}
	for _, text := range strings.Split(policies, "---\n") {
		if strings.TrimSpace(text) == "" {
			continue
		}
		np := &networkingv1.NetworkPolicy{}
		if err := yaml.UnmarshalStrict([]byte(text), np); err != nil {
			t.Fatalf("policy: %v\n%s", err, text)
		}
		w.Objects.NetworkPolicies = append(w.Objects.NetworkPolicies, np)
	}
	return w
}

// attempt reads "shop/web > shop/db 5432/TCP", "~" for ">" being past the source's sidecar; an address instead of a pod is outside,
// and "shop/db@6" is the pod's second address.
func attempt(t *testing.T, w World, text string) Conn {
	t.Helper()
	f := strings.Fields(text)
	end := func(s string) (*corev1.Pod, netip.Addr) {
		s, six := strings.CutSuffix(s, "@6")
		for _, p := range w.Objects.Pods {
			if p.Namespace+"/"+p.Name == s {
				if six {
					return p, Addresses(p)[1]
				}
				return p, Addresses(p)[0]
			}
		}
		return nil, netip.MustParseAddr(s)
	}
	c := Conn{Plaintext: f[1] == "~"}
	c.From, c.FromAddr = end(f[0])
	c.To, c.ToAddr = end(f[2])
	if c.From != nil && c.ToAddr.Is6() {
		c.FromAddr = Addresses(c.From)[1]
	}
	port, protocol, _ := strings.Cut(f[3], "/")
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	c.Port = uint16(n)
	if c.Protocol, err = verdict.ParseProtocol(protocol); err != nil {
		t.Fatal(err)
	}
	return c
}

const (
	denyIn   = "metadata: {namespace: shop, name: deny}\nspec: {podSelector: {}, policyTypes: [Ingress], ingress: []}\n"
	denyOut  = "metadata: {namespace: shop, name: deny-out}\nspec: {podSelector: {}, policyTypes: [Egress]}\n"
	webToAPI = "metadata: {namespace: shop, name: p}\nspec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 80}]}]}\n"
)

func in(namespace, rule string) string {
	return "metadata: {namespace: " + namespace + ", name: p}\nspec: {podSelector: {}, ingress: [" + rule + "]}\n"
}

func out(rule string) string {
	return "metadata: {namespace: shop, name: p}\nspec: {podSelector: {}, policyTypes: [Egress], egress: [" + rule + "]}\n"
}

func TestRecipes(t *testing.T) {
	for _, test := range []struct{ name, policies, allowed, denied string }{
		{"no policy", "", "shop/web > shop/db 1; team/api > shop/db 2/UDP; 198.51.100.7 > shop/db 1; shop/old > shop/db 1; shop/web > 198.51.100.7 1; shop/web ~ shop/db 1", ""},
		{"deny all ingress", denyIn, "shop/web > shop/web 1; shop/web > team/api 1; 10.64.0.1 > shop/db 1; fd00:10:64::1 > shop/db@6 1; shop/web > 198.51.100.7 1; team/old > shop/old 1; shop/db > team/host 5",
			"shop/web > shop/db 1; shop/old > shop/db 1; team/api > shop/old 1; team/api > shop/db 9/UDP; 198.51.100.7 > shop/db 1; 172.18.0.3 > shop/db 1; 10.64.9.9 > shop/db 1; team/host > shop/db 1"},
		{"absent ingress is none", "metadata: {namespace: shop, name: p}\nspec: {podSelector: {}}\n", "shop/web > team/api 1", "shop/web > shop/db 1"},
		{"allow all ingress", denyIn + "---\n" + in("shop", "{}"), "shop/web > shop/db 1; shop/old > shop/db 7/UDP; 198.51.100.7 > shop/db 1; team/host > shop/db 1", "10.64.9.9 > shop/db 1; team/api ~ shop/db 1"},
		{"empty from is anyone", in("shop", "{from: [], ports: []}"), "team/api > shop/db 7/SCTP", "team/api ~ shop/db 7"},
		{"one app to another", webToAPI, "shop/web > shop/api 80; shop/web > shop/api@6 80; shop/web > shop/db 1; shop/db > shop/web 80",
			"shop/web > shop/api 81; shop/web > shop/api 80/UDP; shop/db > shop/api 80; team/api > shop/api 80; shop/web ~ shop/api 80; shop/old > shop/api 80"},
		{"own namespace only", in("shop", "{from: [{podSelector: {}}]}"), "shop/web > shop/db 1; shop/old > shop/db 1", "team/api > shop/db 1; team/old > shop/db 1; 198.51.100.7 > shop/db 1; team/host > shop/db 1"},
		{"another namespace", in("shop", "{from: [{namespaceSelector: {matchLabels: {name: team}}}]}"), "team/api > shop/db 1; team/old > shop/db 1", "shop/web > shop/db 1; strict/api > shop/db 1; team/host > shop/db 1"},
		{"both selectors at once", in("shop", "{from: [{namespaceSelector: {matchLabels: {name: team}}, podSelector: {matchLabels: {app: api}}}]}"), "team/api > shop/db 1", "shop/api > shop/db 1; team/old > shop/db 1; strict/api > shop/db 1"},
		{"either selector", in("shop", "{from: [{namespaceSelector: {matchLabels: {name: team}}}, {podSelector: {matchLabels: {app: api}}}]}"), "team/api > shop/db 1; shop/api > shop/db 1; team/old > shop/db 1", "strict/api > shop/db 1; shop/web > shop/db 1"},
		{"every namespace", in("shop", "{from: [{namespaceSelector: {}}]}"), "team/api > shop/db 1; shop/old > shop/db 1", "198.51.100.7 > shop/db 1; team/host > shop/db 1"},
		{"a selector that matches nobody", in("shop", "{from: [{podSelector: {matchLabels: {app: x}}}]}"), "", "shop/web > shop/db 1; 198.51.100.7 > shop/db 1"},
		{"expressions", in("shop", "{from: [{podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [web, old]}, {key: app, operator: Exists}, {key: x, operator: NotIn, values: [y]}, {key: x, operator: DoesNotExist}]}}]}"), "shop/api > shop/db 1", "shop/web > shop/db 1; shop/old > shop/db 1"},
		{"named ports", in("shop", "{ports: [{port: sql}, {port: metrics}, {port: sync, protocol: SCTP}, {port: sync}]}"), "shop/web > shop/db 5432; shop/web > shop/db 9000; shop/web > shop/db 700/SCTP", "shop/web > shop/db 9001; shop/web > shop/db 700; shop/web > shop/api 5432; shop/web > shop/db 5432/UDP"},
		{"ranges", in("shop", "{ports: [{port: 80, endPort: 82}, {port: 90, endPort: 90, protocol: UDP}, {protocol: SCTP}]}"), "shop/web > shop/db 80; shop/web > shop/db 82; shop/web > shop/db 90/UDP; shop/web > shop/db 65535/SCTP", "shop/web > shop/db 79; shop/web > shop/db 83; shop/web > shop/db 90; shop/web > shop/db 80/UDP; shop/web > shop/db 91/UDP"},
		{"block with exception", in("shop", "{from: [{ipBlock: {cidr: 198.51.0.0/16, except: [198.51.100.0/24]}}, {ipBlock: {cidr: '2001:db8::/32'}}]}"), "198.51.99.1 > shop/db 1; 198.51.101.0 > shop/db 1; 2001:db8::1 > shop/db@6 1", "198.51.100.7 > shop/db 1; 198.52.0.0 > shop/db 1; shop/web > shop/db 1; 2001:db9::1 > shop/db@6 1"},
		{"blocks hold pods", in("shop", "{from: [{ipBlock: {cidr: 10.64.0.0/16, except: [10.64.0.14/32]}}]}"), "shop/web > shop/db 1; team/old > shop/db 1", "team/api > shop/db 1; shop/web > shop/db@6 1; 10.64.9.9 > shop/db 1"},
		{"a block carved away whole", in("shop", "{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [0.0.0.0/1, 128.0.0.0/1]}}]}"), "", "198.51.99.1 > shop/db 1; 8.8.8.8 > shop/db 1; shop/web > shop/db 1"},
		{"deny all egress", denyOut, "shop/web > shop/web 1; team/api > shop/db 1; shop/web > 10.64.0.1 1; shop/old > team/old 1; shop/old > 198.51.100.7 1; shop/old > team/api 1; shop/web ~ team/api 1", "shop/web > shop/db 1; shop/web > team/old 1; shop/web > 198.51.100.7 1; shop/web > team/host 1"},
		{"egress to DNS and a block", out("{ports: [{port: 53, protocol: UDP}]}, {to: [{ipBlock: {cidr: 198.51.100.0/24}}]}"), "shop/web > team/api 53/UDP; shop/web > 8.8.8.8 53/UDP; shop/web > 198.51.100.7 443", "shop/web > team/api 53; shop/web > 198.51.101.7 443"},
		{"egress by selector and named port", out("{to: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: sql}]}, {to: [{ipBlock: {cidr: 0.0.0.0/0}}], ports: [{port: sql}]}"), "shop/web > shop/db 5432; shop/web > strict/db 5432", "shop/web > shop/db 5433; shop/web > shop/api 5432; shop/web > 8.8.8.8 5432"},
		{"both ends, by whoever guards", denyOut + "---\n" + in("team", "{}"), "team/old > team/api 1", "shop/web > team/api 1; shop/old > team/api 1; shop/web > team/old 1; shop/web ~ team/api 1"},
		{"an egress section implies Egress", "metadata: {namespace: shop, name: p}\nspec: {podSelector: {matchLabels: {app: web}}, egress: [{ports: [{port: 1}]}]}\n", "shop/web > team/api 1; shop/db > team/api 2", "shop/web > team/api 2; team/api > shop/web 1"},
		{"an empty egress section does not", "metadata: {namespace: shop, name: p}\nspec: {podSelector: {matchLabels: {app: web}}, egress: [], policyTypes: []}\n", "shop/web > team/api 2", "team/api > shop/web 1"},
		{"egress to every pod", out("{to: [{namespaceSelector: {}}]}, {ports: [{port: sql}]}"), "shop/web > team/api 1; shop/web > shop/db 5432", "shop/web > team/host 1; shop/web > 8.8.8.8 1"},
		{"egress only leaves ingress alone", out("{}"), "team/api > shop/db 1; shop/web > team/api 1; shop/web > 8.8.8.8 1", ""},
		{"policies add up", webToAPI + "---\n" + in("shop", "{from: [{podSelector: {matchLabels: {app: db}}}]}"), "shop/web > shop/api 80; shop/db > shop/api 81", "shop/web > shop/db 80"},
		{"strict without policy", "", "shop/web > strict/api 1; 10.64.0.1 > strict/api 1; strict/api > shop/old 1", "shop/old > strict/api 1; 198.51.100.7 > strict/api 1; shop/web ~ strict/api 1; 10.64.9.9 > strict/api 1; team/host > strict/api 1"},
		{"strict with anyone", in("strict", "{}"), "shop/web > strict/api 1; 10.64.0.1 > strict/api 1", "shop/old > strict/api 1; 198.51.100.7 > strict/api 1; shop/web ~ strict/api 1; team/host > strict/api 1"},
		{"strict with selectors", in("strict", "{from: [{namespaceSelector: {}}]}"), "shop/web > strict/api 1", "team/old > strict/api 1; team/far > strict/api 1; 198.51.100.7 > strict/api 1"},
		{"permissive with selectors", in("shop", "{from: [{namespaceSelector: {}}]}"), "team/far > shop/api 1", "198.51.100.7 > shop/api 1"},
		{"strict with a block", in("strict", "{from: [{ipBlock: {cidr: 0.0.0.0/0}}, {namespaceSelector: {}}], ports: [{port: 1}]}"), "shop/web > strict/api 1; 198.51.100.7 > strict/api 1; team/host > strict/api 1", "shop/old > strict/api 1; 198.51.100.7 > strict/api 2; shop/web ~ strict/api 1; 10.64.9.9 > strict/api 1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := shop(t, test.policies)
			for want, list := range map[bool]string{true: test.allowed, false: test.denied} {
				for _, text := range strings.Split(list, ";") {
					if strings.TrimSpace(text) == "" {
						continue
					}
					if got, why := w.Allowed(attempt(t, w, text)); got != want {
						t.Errorf("%s: allowed is %t, should be %t: %s", strings.TrimSpace(text), got, want, why)
					}
				}
			}
		})
	}
}

// TestPieces asks for one policy alone, as those do who check one end.
func TestPieces(t *testing.T) {
	w := shop(t, denyIn+"---\n"+in("team", "{from: [{podSelector: {}}]}")+"---\n"+out("{to: [{namespaceSelector: {}}]}"))
	for text, want := range map[string][2]bool{ // ingress, egress
		"shop/web > shop/db 1":   {false, true},
		"shop/web > team/host 1": {true, false},
		"team/host > team/api 1": {false, true},
		"team/old > team/api 1":  {true, true},
		"8.8.8.8 > team/api 1":   {false, true},
		"shop/web > 8.8.8.8 1":   {true, false},
	} {
		c := attempt(t, w, text)
		in, _ := w.Ingress(c)
		out, _ := w.Egress(c)
		if got := [2]bool{in, out}; got != want {
			t.Errorf("%s: ingress and egress allow %v, should be %v", text, got, want)
		}
	}
	for pod, want := range map[string]int{"shop/web": 1, "team/api": 1, "team/host": 0, "strict/api": 0} {
		c := attempt(t, w, pod+" > 8.8.8.8 1")
		if got := len(w.Isolating(c.From, networkingv1.PolicyTypeIngress)); got != want {
			t.Errorf("%s is isolated for ingress by %d policies, should be %d", pod, got, want)
		}
	}
}

func TestAllowedNamesTheRule(t *testing.T) {
	w := shop(t, denyIn+"---\n"+webToAPI)
	for text, want := range map[string]string{
		"shop/web > shop/api 80": "shop/p ingress[0]",
		"shop/web > shop/api 81": "no ingress rule of shop/deny, shop/p",
	} {
		if _, why := w.Allowed(attempt(t, w, text)); why != want {
			t.Errorf("%s: why is %q, should be %q", text, why, want)
		}
	}
}

func TestUnreadablePieceAdmitsNobody(t *testing.T) {
	w := shop(t, in("shop", "{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [x]}}, {ipBlock: {cidr: x}}, {}]}"))
	if ok, why := w.Allowed(attempt(t, w, "shop/web > shop/db 1")); ok {
		t.Error("allowed by", why)
	}
	w.Objects.NetworkPolicies = nil
	w.Objects.Namespaces[0].Labels[policy.ModeLabel] = "x"
	if ok, why := w.Allowed(attempt(t, w, "shop/old > shop/db 1")); ok {
		t.Error("an unreadable mode is not strict:", why)
	}
}
