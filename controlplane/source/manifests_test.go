package source

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
)

var update = flag.Bool("update", false, "rewrite what the tests want")

// Each testdata/*.txtar holds files, which are read as the folder "in", and "want": the objects in short, or the error. A file
// "options" sets Options, and paths to read instead.
func TestReadManifests(t *testing.T) {
	archives, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(archives) == 0 {
		t.Fatalf("no testdata: %v", err)
	}
	for _, path := range archives {
		abs, err := filepath.Abs(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(abs)
			if err != nil {
				t.Fatal(err)
			}
			want := -1
			o, paths := Options{}, []string{"in"}
			t.Chdir(t.TempDir())
			for i, f := range ar.Files {
				switch f.Name {
				case "want":
					want = i
				case "options":
					paths = options(t, string(f.Data), &o, paths)
				default:
					write(t, filepath.Join("in", f.Name), f.Data)
				}
			}
			if want < 0 {
				ar.Files = append(ar.Files, txtar.File{Name: "want"})
				want = len(ar.Files) - 1
			}
			got := summary(ReadManifests(paths, o))
			if *update {
				ar.Files[want].Data = []byte(got)
				if err := os.WriteFile(abs, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(ar.Files[want].Data), got); diff != "" {
				t.Errorf("want -, got + (refresh with -update):\n%s", diff)
			}
			if again := summary(ReadManifests(paths, o)); again != got {
				t.Errorf("not deterministic:\n%s", cmp.Diff(got, again))
			}
		})
	}
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func options(t *testing.T, text string, o *Options, paths []string) []string {
	t.Helper()
	for _, word := range strings.Fields(text) {
		switch k, v, _ := strings.Cut(word, "="); k {
		case "replicas":
			if _, err := fmt.Sscan(v, &o.Replicas); err != nil {
				t.Fatal(err)
			}
		case "inject":
			o.Inject = map[string]InjectScope{"all": InjectAll}[v]
		case "namespace":
			o.Namespace = v
		case "paths":
			paths = strings.Split(v, ",")
		default:
			t.Fatalf("option %q", word)
		}
	}
	return paths
}

// summary writes down everything that ReadManifests decides.
func summary(m *Manifests, err error) string {
	var b strings.Builder
	if err != nil {
		var ps Problems
		if !errors.As(err, &ps) {
			return fmt.Sprintf("not Problems: %v\n", err)
		}
		for _, p := range ps {
			fmt.Fprintln(&b, p)
		}
		return b.String()
	}
	for _, o := range m.Objects.Namespaces {
		fmt.Fprintf(&b, "namespace %s %s\n", o.Name, pairs(o.Labels))
	}
	for _, o := range m.Objects.Nodes {
		if o.Name != defaultNode {
			fmt.Fprintf(&b, "node %s %s\n", o.Name, pairs(o.Labels))
		}
	}
	for _, o := range m.Objects.Pods {
		fmt.Fprintf(&b, "pod %s/%s", o.Namespace, o.Name)
		for _, ip := range o.Status.PodIPs {
			fmt.Fprintf(&b, " %s", ip.IP)
		}
		ready, _ := readiness(o)
		fmt.Fprintf(&b, " %s", o.Status.Phase)
		if ready {
			fmt.Fprint(&b, ",ready")
		}
		if o.Spec.NodeName != defaultNode {
			fmt.Fprintf(&b, " on %s", o.Spec.NodeName)
		}
		fmt.Fprintf(&b, " sa=%s", o.Spec.ServiceAccountName)
		for _, c := range o.Spec.Containers {
			for _, p := range c.Ports {
				fmt.Fprintf(&b, " %s:%d/%s", p.Name, p.ContainerPort, p.Protocol)
			}
		}
		for _, ref := range o.OwnerReferences {
			fmt.Fprintf(&b, " of %s %s", ref.Kind, ref.Name)
		}
		fmt.Fprintf(&b, "\n  labels %s\n", pairs(o.Labels))
		if len(o.Annotations) > 0 {
			fmt.Fprintf(&b, "  annotations %s\n", pairs(o.Annotations))
		}
	}
	for _, o := range m.Objects.Services {
		fmt.Fprintf(&b, "service %s/%s %s %s", o.Namespace, o.Name, o.Spec.Type, strings.Join(o.Spec.ClusterIPs, " "))
		for _, p := range o.Spec.Ports {
			fmt.Fprintf(&b, " %s:%d/%s→%s", p.Name, p.Port, p.Protocol, p.TargetPort.String())
		}
		fmt.Fprintf(&b, " %s\n", o.Spec.IPFamilies)
	}
	for _, o := range m.Objects.EndpointSlices {
		fmt.Fprintf(&b, "slice %s/%s of %s %s", o.Namespace, o.Name, o.Labels["kubernetes.io/service-name"], o.AddressType)
		for _, p := range o.Ports {
			fmt.Fprintf(&b, " %s:%d/%s", *p.Name, *p.Port, *p.Protocol)
		}
		fmt.Fprintln(&b)
		for _, e := range o.Endpoints {
			fmt.Fprintf(&b, "  %s", strings.Join(e.Addresses, ","))
			if e.TargetRef != nil {
				fmt.Fprintf(&b, " %s", e.TargetRef.Name)
			}
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				fmt.Fprint(&b, " not ready")
			}
			if e.Conditions.Terminating != nil && *e.Conditions.Terminating {
				fmt.Fprint(&b, " terminating")
			}
			if e.NodeName != nil && *e.NodeName != defaultNode {
				fmt.Fprintf(&b, " on %s", *e.NodeName)
			}
			if e.Zone != nil {
				fmt.Fprintf(&b, " in %s", *e.Zone)
			}
			if e.Hints != nil {
				fmt.Fprintf(&b, " for nodes %v and zones %v", e.Hints.ForNodes, e.Hints.ForZones)
			}
			if e.Hostname != nil {
				fmt.Fprintf(&b, " hostname=%s", *e.Hostname)
			}
			fmt.Fprintln(&b)
		}
	}
	for _, o := range m.Objects.NetworkPolicies {
		fmt.Fprintf(&b, "policy %s/%s\n", o.Namespace, o.Name)
	}
	fmt.Fprintf(&b, "pod network %s\nservice network %s\n", m.PodNetwork, m.ServiceNetwork)
	for _, k := range slices.Sorted(maps.Keys(m.Ignored)) {
		fmt.Fprintf(&b, "ignored %s: %d\n", k, m.Ignored[k])
	}
	for _, w := range m.Warnings {
		fmt.Fprintf(&b, "warning: %s\n", w)
	}
	return b.String()
}

func pairs(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+"="+m[k])
	}
	return "{" + strings.Join(out, ", ") + "}"
}

// consistent checks what holds for any success, and returns what does not.
func consistent(m *Manifests) error {
	ns := map[string]bool{}
	for _, o := range m.Objects.Namespaces {
		if ns[o.Name] || o.Labels[corev1.LabelMetadataName] != o.Name {
			return fmt.Errorf("namespace %s is there twice, or not labelled", o.Name)
		}
		ns[o.Name] = true
	}
	addrs := map[string]string{}
	last := ""
	for _, o := range m.Objects.Pods {
		key := o.Namespace + "/" + o.Name
		if o.Namespace == "" || o.Name == "" || !ns[o.Namespace] {
			return fmt.Errorf("pod %q: no such namespace", key)
		}
		if last != "" && slices.Compare(strings.Split(last, "/"), strings.Split(key, "/")) >= 0 {
			return fmt.Errorf("pod %s after %s", key, last)
		}
		last = key
		if len(o.Status.PodIPs) == 0 || o.Status.PodIP != o.Status.PodIPs[0].IP || len(o.Status.HostIPs) != 2 || o.Status.Phase == "" {
			return fmt.Errorf("pod %s: incomplete status %+v", key, o.Status)
		}
		for _, ip := range o.Status.PodIPs {
			if other := addrs[ip.IP]; other != "" {
				return fmt.Errorf("pods %s and %s share %s", key, other, ip.IP)
			}
			addrs[ip.IP] = key
			if !within(ip.IP, m.PodNetwork) {
				return fmt.Errorf("pod %s: %s is outside of the pod network %s", key, ip.IP, m.PodNetwork)
			}
		}
	}
	if last == "" {
		return fmt.Errorf("no pods")
	}
	for _, o := range m.Objects.Services {
		if !ns[o.Namespace] {
			return fmt.Errorf("service %s/%s: no such namespace", o.Namespace, o.Name)
		}
		if o.Spec.Type != corev1.ServiceTypeExternalName && len(o.Spec.ClusterIPs) == 0 {
			return fmt.Errorf("service %s/%s: no cluster IPs", o.Namespace, o.Name)
		}
		for _, ip := range o.Spec.ClusterIPs {
			if ip == corev1.ClusterIPNone {
				continue
			}
			if other := addrs[ip]; other != "" {
				return fmt.Errorf("service %s/%s shares %s with %s", o.Namespace, o.Name, ip, other)
			}
			addrs[ip] = "service " + o.Name
			if !within(ip, m.ServiceNetwork) {
				return fmt.Errorf("service %s/%s: %s is outside of %s", o.Namespace, o.Name, ip, m.ServiceNetwork)
			}
		}
	}
	sliceNames := map[string]bool{}
	for _, o := range m.Objects.EndpointSlices {
		if key := o.Namespace + "/" + o.Name; sliceNames[key] {
			return fmt.Errorf("slice %s is there twice", key)
		} else {
			sliceNames[key] = true
		}
		for _, e := range o.Endpoints {
			if e.TargetRef != nil && o.Labels["endpointslice.kubernetes.io/managed-by"] == sliceController && len(e.Addresses) == 1 &&
				within(e.Addresses[0], podRanges) && addrs[canonical(e.Addresses[0])] == "" {
				return fmt.Errorf("slice %s/%s: nobody has %s", o.Namespace, o.Name, e.Addresses[0])
			}
		}
	}
	for _, o := range m.Objects.NetworkPolicies {
		if errs := policy.Validate(o); len(errs) > 0 || !ns[o.Namespace] {
			return fmt.Errorf("policy %s/%s: %v", o.Namespace, o.Name, errs)
		}
	}
	return nil
}

func within(ip string, prefixes []netip.Prefix) bool {
	a, err := netip.ParseAddr(ip)
	return err == nil && slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}
