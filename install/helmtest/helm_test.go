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
	all, err := chartutil.ToRenderValues(c, read, chartutil.ReleaseOptions{Name: "mantlet", Namespace: "shield", Revision: 1, IsInstall: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	files, err := engine.Render(c, all)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
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
	return out
}
