// Package install renders what Mantlet is made of in a cluster.
//
// There is one source: the Helm chart in the folder chart. This package renders the same templates without Helm, whose library is larger
// than all of Mantlet; so the templates keep to text/template and the functions in template.go, and a test outside of this module
// (helmtest) holds both outputs equal. Values that the chart does not have are refused, and the configuration file that comes out is read as
// the control plane will read it.
package install

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/settings"
)

//go:embed all:chart
var chart embed.FS

// files are the chart's templates in the order in which they are to be applied: the webhooks, which have the API server wait for the
// control plane, come last.
var files = []string{"namespace.yaml", "rbac.yaml", "networkpolicies.yaml", "controlplane.yaml", "node.yaml", "guards.yaml", "webhooks.yaml"}

// Values are the values of the chart, for those who check them; values.yaml says what they mean.
type Values struct {
	Image            string            `json:"image"`
	ImagePullPolicy  corev1.PullPolicy `json:"imagePullPolicy"`
	ImagePullSecrets []string          `json:"imagePullSecrets"`
	CreateNamespace  bool              `json:"createNamespace"`
	TrustDomain      string            `json:"trustDomain"`
	MTLS             string            `json:"mtls"`
	Capture          string            `json:"capture"`
	PodSecurity      string            `json:"podSecurity"`
	InjectByDefault  bool              `json:"injectByDefault"`
	SystemNamespaces []string          `json:"systemNamespaces"`
	PodNetworks      []string          `json:"podNetworks"`
	ServiceNetworks  []string          `json:"serviceNetworks"`
	NodeAddresses    []string          `json:"nodeAddresses"`
	NodePorts        string            `json:"nodePorts"`
	Sidecar          settings.Sidecar  `json:"sidecar"`
	Metrics          Metrics           `json:"metrics"`
	ControlPlane     ControlPlane      `json:"controlPlane"`
	Node             Node              `json:"node"`
}

// Metrics is Values.metrics.
type Metrics struct {
	From []networkingv1.NetworkPolicyPeer `json:"from"` // empty: nobody
}

// Node is Values.node, of the daemon that there is where capture is node.
type Node struct {
	Plugin      string                      `json:"plugin"` // installed or removed
	KubeletRoot string                      `json:"kubeletRoot"`
	CNIBinDir   string                      `json:"cniBinDir"`
	CNIConfDir  string                      `json:"cniConfDir"`
	Resources   corev1.ResourceRequirements `json:"resources"`
}

// ControlPlane is Values.controlPlane.
type ControlPlane struct {
	Replicas          int32                       `json:"replicas"`
	Resources         corev1.ResourceRequirements `json:"resources"`
	PriorityClassName string                      `json:"priorityClassName"`
	NodeSelector      map[string]string           `json:"nodeSelector"`
	Tolerations       []corev1.Toleration         `json:"tolerations"`
	APIServerPorts    []uint16                    `json:"apiServerPorts"`
}

// Options of [Render].
type Options struct {
	Namespace string   // "": names.SystemNamespace
	Values    [][]byte // YAML, over the chart's own values; later ones go over earlier ones
	Set       []string // "a.b=value", value as YAML; over Values
}

// Manifest is one object.
type Manifest struct {
	APIVersion, Kind, Namespace, Name string
	Text                              []byte // YAML, without markers
}

// Render renders the objects in the order in which they are to be applied: the same options, the same bytes.
func Render(o Options) ([]Manifest, error) {
	if o.Namespace == "" {
		o.Namespace = names.SystemNamespace
	}
	values, err := o.values()
	if err != nil {
		return nil, err
	}
	texts, err := execute(o.Namespace, values)
	if err != nil {
		return nil, err
	}
	var out []Manifest
	for _, text := range texts {
		for doc := range bytes.SplitSeq(text, []byte("\n---\n")) {
			m, err := manifest(doc)
			if err != nil {
				return nil, err
			}
			if m.Kind != "" {
				out = append(out, m)
			}
		}
	}
	return out, readable(out)
}

// values merges and checks them.
func (o Options) values() (map[string]any, error) {
	own, err := chart.ReadFile("chart/values.yaml")
	if err != nil {
		return nil, err
	}
	merged := map[string]any{}
	for i, text := range append([][]byte{own}, o.Values...) {
		var one map[string]any
		value, err := yaml.YAMLToJSONStrict(text)
		if err == nil {
			err = kjson.UnmarshalCaseSensitivePreserveInts(value, &one)
		}
		if err != nil {
			return nil, fmt.Errorf("values file %d: %w", i, err)
		}
		merge(merged, one)
	}
	for _, s := range o.Set {
		if err := set(merged, s); err != nil {
			return nil, fmt.Errorf("--set %s: %w", s, err)
		}
	}
	return merged, check(merged)
}

// check refuses what the chart does not know.
func check(values map[string]any) error {
	text, err := yaml.Marshal(values)
	if err != nil {
		return err
	}
	value, err := yaml.YAMLToJSON(text)
	if err != nil {
		return err
	}
	var v Values
	unknown, err := kjson.UnmarshalStrict(value, &v)
	if err = errors.Join(append(unknown, err)...); err != nil {
		return fmt.Errorf("values: %w\n  hint: mantlet install --show-values lists those that there are", err)
	}
	_, tag, tagged := strings.Cut(v.Image[strings.LastIndexByte(v.Image, '/')+1:], ":")
	switch {
	case v.Image == "":
		return errors.New("values: image is missing\n  hint: --set image=registry.example/mantlet@sha256:… names the image of control plane and sidecars")
	case !tagged || tag == "latest":
		return fmt.Errorf("values: image %s is not pinned: what runs would change by itself\n  hint: name a digest (@sha256:…), or a tag", v.Image)
	case v.Node.Plugin != "installed" && v.Node.Plugin != "removed":
		return fmt.Errorf("values: node.plugin %q: it is installed or removed", v.Node.Plugin)
	case v.Node.Plugin == "removed" && v.Capture != "node":
		return fmt.Errorf("values: node.plugin removed with capture %s: there is no daemon that would do it\n  hint: name the values of the installation, with capture=node", v.Capture)
	case v.ControlPlane.Replicas < 1:
		return fmt.Errorf("values: controlPlane.replicas %d: at least 1", v.ControlPlane.Replicas)
	}
	for i, p := range v.Metrics.From {
		if p.PodSelector == nil && p.NamespaceSelector == nil && p.IPBlock == nil {
			return fmt.Errorf("values: metrics.from[%d]: it names nobody\n  hint: give it a podSelector, a namespaceSelector or both, or an ipBlock; {} as a selector is everybody", i)
		}
	}
	return nil
}

// readable reads the configuration file as the control plane will.
func readable(list []Manifest) error {
	i := slices.IndexFunc(list, func(m Manifest) bool { return m.Kind == "ConfigMap" })
	if i < 0 {
		return errors.New("install: the chart has no ConfigMap")
	}
	var cm corev1.ConfigMap
	if err := yaml.Unmarshal(list[i].Text, &cm); err != nil {
		return fmt.Errorf("ConfigMap %s: %w", list[i].Name, err)
	}
	if _, err := settings.Read([]byte(cm.Data["settings.yaml"])); err != nil {
		return fmt.Errorf("values: %w", err)
	}
	return nil
}

// manifest reads what an object is called; one without anything but comments has no kind.
func manifest(text []byte) (Manifest, error) {
	var o struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name      string `json:"name"`
			Namespace string `json:"namespace"`
		} `json:"metadata"`
	}
	if err := yaml.Unmarshal(text, &o); err != nil {
		return Manifest{}, fmt.Errorf("install: %w in\n%s", err, text)
	}
	return Manifest{APIVersion: o.APIVersion, Kind: o.Kind, Namespace: o.Metadata.Namespace, Name: o.Metadata.Name,
		Text: append(bytes.TrimSpace(text), '\n')}, nil
}

// ShowValues is values.yaml, with what each value means.
func ShowValues() ([]byte, error) { return chart.ReadFile("chart/values.yaml") }
