package settings

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/resource"
)

const least = "namespace: mantlet-system\ntrustDomain: mantlet.local\nimage: registry.example/mantlet@sha256:01\n"

func TestRead(t *testing.T) {
	s, err := Read([]byte(least + `
mtls: strict
podNetworks: [10.0.0.0/8]
serviceNetworks: ["fd00::/108"]
nodeAddresses: ["::ffff:192.0.2.1"]
nodePorts: 20000-20999
systemNamespaces: [kube-public]
sidecar: {resources: {requests: {cpu: 20m}}, concurrency: 2, drainTimeout: 7s}
`))
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Inject()
	if err != nil {
		t.Fatal(err)
	}
	if c.ControlPlane != "mantlet.mantlet-system.svc:15012" || c.Concurrency != 2 || c.DrainTimeout != 7*time.Second ||
		c.Resources.Requests.Cpu().Cmp(resource.MustParse("20m")) != 0 || !c.IsSystem("mantlet-system") || !c.IsSystem("kube-public") || c.IsSystem("shop") {
		t.Errorf("sidecars: %+v", c)
	}
	pods, services, _ := s.Networks()
	nodes, _ := s.NodeAddrs()
	mode, _ := s.Mode()
	ports, _ := s.NodePortRange()
	got := []string{pods[0].String(), services[0].String(), nodes[0].String(), ports.String(), mode.String()}
	if diff := cmp.Diff([]string{"10.0.0.0/8", netip.MustParsePrefix("fd00::/108").String(), "192.0.2.1", "20000-20999", "strict"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestRefused(t *testing.T) {
	for add, want := range map[string]string{
		"trustdomain: x": "unknown field", "mtls: off": "mtls", "podNetworks: [10.0.0.1/8]": "podNetworks[0]", "nodeAddresses: [fe80::1%eth0]": "nodeAddresses[0]",
		"nodePorts: 2-1": "nodePorts: \"2-1\" is not", "nodePorts: 0-9": "nodePorts", "nodePorts: 1-65536": "nodePorts", "nodePorts: 1+5": "nodePorts",
		"capture: pod": "capture", "podSecurity: on": "podSecurity", "image: ''": "already set", "sidecar: {concurrency: -1}": "concurrency",
	} {
		if _, err := Read([]byte(least + add)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q in it", add, err, want)
		}
	}
	if _, err := Read([]byte("trustDomain: a\nimage: b")); err == nil {
		t.Error("no namespace, and it passes")
	}
}
