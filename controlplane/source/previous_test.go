package source

import (
	"os"
	"path/filepath"
	"testing"
)

func TestAddressesStayFromOneReadingToTheNext(t *testing.T) {
	file := filepath.Join(t.TempDir(), "m.yaml")
	read := func(text string, previous *Manifests) *Manifests {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		m, err := ReadManifests([]string{file}, Options{Previous: previous})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	pod := func(name string) string {
		return "apiVersion: v1\nkind: Pod\nmetadata: {name: " + name + ", labels: {a: b}}\nspec: {containers: [{name: c, image: i}]}\n---\n"
	}
	service := func(name string) string {
		return "apiVersion: v1\nkind: Service\nmetadata: {name: " + name + "}\nspec: {selector: {a: b}, ports: [{port: 80}]}\n---\n"
	}
	addresses := func(m *Manifests) map[string]string {
		out := map[string]string{}
		for _, p := range m.Objects.Pods {
			for _, ip := range p.Status.PodIPs {
				out[ip.IP] = "pod " + p.Name
			}
		}
		for _, s := range m.Objects.Services {
			for _, ip := range s.Spec.ClusterIPs {
				out[ip] = "service " + s.Name
			}
		}
		return out
	}
	first := read(pod("m")+pod("o")+service("s"), nil)
	second := read(pod("a")+pod("m")+service("b")+service("s"), first) // o is gone; a and b come before m and s
	before, after := addresses(first), addresses(second)
	if len(after) != 8 {
		t.Fatalf("addresses: %v", after)
	}
	for a, who := range before {
		if who != "pod o" && after[a] != who {
			t.Errorf("%s was the address of %s and is now of %q", a, who, after[a])
		}
	}
}
