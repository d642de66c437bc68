package envoy

import (
	"strings"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/bootstrap/internal_listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/downstream_connections/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// The bootstrap is made without Envoy's types; here they say whether it is one.
func TestBootstrapIsOne(t *testing.T) {
	for name, mark := range map[string]uint32{"own user": 0, "shared user": names.ProxyMark} {
		t.Run(name, func(t *testing.T) {
			text, err := Bootstrap{Pod: "shop/web-0", AgentSocket: "/run/a.sock", AdminSocket: "/run/e/admin.sock", Mark: mark}.JSON()
			if err != nil {
				t.Fatal(err)
			}
			var b bootstrapv3.Bootstrap
			if err := protojson.Unmarshal(text, &b); err != nil {
				t.Fatal(err)
			}
			if err := b.ValidateAll(); err != nil {
				t.Error(err)
			}
			if got := b.GetNode().GetId(); got != "shop/web-0" {
				t.Errorf("node id %q", got)
			}
			if p := b.GetAdmin().GetAddress().GetPipe(); p.GetPath() != "/run/e/admin.sock" || p.GetMode() != 0o600 {
				t.Errorf("admin %v", p)
			}
			options := b.GetClusterManager().GetUpstreamBindConfig().GetSocketOptions()
			if mark == 0 && options != nil || mark != 0 && (len(options) != 1 || options[0].GetIntValue() != int64(mark)) {
				t.Errorf("mark %#x: socket options %v", mark, options)
			}
			c := b.GetStaticResources().GetClusters()
			if len(c) != 1 || c[0].GetName() != names.ClusterAgent {
				t.Errorf("static clusters %v", c)
			}
		})
	}
}

func TestBootstrapRefuses(t *testing.T) {
	good := Bootstrap{Pod: "a/b", AgentSocket: "/a", AdminSocket: "/b"}
	for name, change := range map[string]func(*Bootstrap){
		"no pod":       func(b *Bootstrap) { b.Pod = "" },
		"no namespace": func(b *Bootstrap) { b.Pod = "/b" },
		"no name":      func(b *Bootstrap) { b.Pod = "a/" },
		"three parts":  func(b *Bootstrap) { b.Pod = "a/b/c" },
		"no socket":    func(b *Bootstrap) { b.AgentSocket = "" },
		"long socket":  func(b *Bootstrap) { b.AdminSocket = strings.Repeat("x", 108) },
	} {
		b := good
		change(&b)
		if _, err := b.JSON(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := good.JSON(); err != nil {
		t.Error(err)
	}
}

func TestMapped(t *testing.T) {
	for _, tt := range []struct {
		text        string
		pod, mapped bool
	}{
		{"         0          0 4294967295\n", true, true},
		{"         0       1000          1\n", false, false},
		{"         0     524288      65536\n", false, true}, // a pod with hostUsers: false
		{"         0       1000          1\n         1     100000      65536\n", false, true},
		{"     20001          0     100000\n", false, false},
		{"     20000          0      40000\n", false, true},
		{"     20000          0      39999\n", false, false},
		{"     20000          0      20000\n     40000      20000      20000\n", false, false}, // that is no range
		{"2000000000          0  134217728\n", true, false},
		{"", false, false},
	} {
		if pod, inPod := mapped(tt.text, proxyuser.Pod), mapped(tt.text, proxyuser.Mapped); pod != tt.pod || inPod != tt.mapped {
			t.Errorf("%q: %t, %t, want %t, %t", tt.text, pod, inPod, tt.pod, tt.mapped)
		}
	}
}
