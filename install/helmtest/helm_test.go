// Package helmtest holds what `mantlet install` writes against what Helm makes of the same chart. It is a module of its own, so that
// Helm's library is not one of Mantlet's.
package helmtest

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"

	"github.com/mantlet/mantlet/install"
)

func TestEqual(t *testing.T) {
	c, err := loader.Load("../chart")
	if err != nil {
		t.Fatal(err)
	}
	for name, values := range map[string]string{
		"least":   "image: registry.example/mantlet@sha256:01",
		"others":  "image: registry.example/mantlet@sha256:01\ncreateNamespace: false\ninjectByDefault: true\nmtls: strict\npodSecurity: ignored",
		"node":    "image: registry.example/mantlet@sha256:01\ncapture: node\nnode: {kubeletRoot: /srv/kubelet}",
		"clean":   "image: registry.example/mantlet@sha256:01\ncapture: node\nnode: {plugin: removed}",
		"metrics": "image: registry.example/mantlet@sha256:01\nmetrics: {from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: prometheus}}}, {ipBlock: {cidr: 192.0.2.0/24}}]}",
		"lists": `
image: registry.example/mantlet:1.2.3
imagePullSecrets: [one, two]
systemNamespaces: []
podNetworks: [10.244.0.0/16, "fd00::/48"]
nodeAddresses: [10.244.0.1]
nodePorts: 20000-20999
sidecar: {concurrency: 4, resources: {requests: {cpu: "1", memory: 1Gi}, limits: null}, drainTimeout: 1m}
controlPlane:
  replicas: 3
  nodeSelector: {example.com/pool: infra, kubernetes.io/os: null}
  tolerations: [{key: a, operator: Exists, effect: NoSchedule}, {key: b, tolerationSeconds: 3600}]
  apiServerPorts: [443, 10250]
`,
		"ranges": `
image: registry.example:5000/team/mantlet:1.2.3@sha256:01
podNetworks: [0.0.0.0/0, 10.128.0.0/9, 172.16.0.0/12, 192.168.4.0/22, 192.0.2.128/25, 192.0.2.1/32, "::/0", "fd00:10::/108", "2001:db8::1/128"]
serviceNetworks: [10.96.0.0/16, "::ffff:10.0.0.0/104"]
nodeAddresses: [192.0.2.255, "fe80::1", "::1", "2001:db8:0:0:0:0:0:1"]
nodePorts: 1-65535
`,
		"figures": `
image: mantlet:1
sidecar: {concurrency: 0, resources: {requests: {cpu: 1, memory: 1e3}, limits: {cpu: 0.5, memory: 128974848, example.com/card: 2}}, drainTimeout: 0s, startupTimeout: 1m30.5s}
metrics:
  from:
  - namespaceSelector: {matchExpressions: [{key: team, operator: In, values: [ops]}, {key: old, operator: DoesNotExist}]}
  - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}
controlPlane: {tolerations: [{operator: Exists}, {key: a, value: b, effect: NoExecute, tolerationSeconds: 10}], nodeSelector: {a: ""}, priorityClassName: ""}
`,
	} {
		t.Run(name, func(t *testing.T) {
			own, err := install.Render(install.Options{Namespace: "shield", Values: [][]byte{[]byte(values)}})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, m := range own {
				got = append(got, string(m.Text))
			}
			slices.Sort(got)
			if want := helm(t, c, values); !slices.Equal(got, want) {
				t.Errorf("mantlet install:\n%s\n\nhelm:\n%s", strings.Join(got, "---\n"), strings.Join(want, "---\n"))
			}
		})
	}
}

// helm renders the chart as `helm template --namespace shield mantlet` does, and sorts the documents.
func helm(t *testing.T, c *chart.Chart, values string) []string {
	t.Helper()
	read, err := chartutil.ReadValues([]byte(values))
	if err != nil {
		t.Fatal(err)
	}
	out, err := rendered(c, read)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func rendered(c *chart.Chart, values chartutil.Values) (out []string, err error) {
	all, err := chartutil.ToRenderValues(c, values, chartutil.ReleaseOptions{Name: "mantlet", Namespace: "shield", Revision: 1, IsInstall: true}, nil)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(c, all)
	if err != nil {
		return nil, err
	}
	for name, text := range files {
		if !strings.HasSuffix(name, ".yaml") {
			continue
		}
		for doc := range bytes.SplitSeq([]byte(text), []byte("\n---\n")) {
			if d := bytes.TrimSpace(doc); len(d) > 0 {
				out = append(out, string(d)+"\n")
			}
		}
	}
	slices.Sort(out)
	return out, nil
}
