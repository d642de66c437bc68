package inject

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"github.com/mantlet/mantlet/controlplane/inject/names"
)

// Operation is one of a JSON patch (RFC 6902): "add", "replace" or "remove". Paths are JSON pointers into the pod.
type Operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// edit changes a pod and writes down how.
type edit struct {
	pod *corev1.Pod
	ops []Operation
}

func (e *edit) op(op, path string, value any) {
	e.ops = append(e.ops, Operation{Op: op, Path: path, Value: value})
}

// first puts the sidecar before all other init containers, in the place of one that is there.
func (e *edit) first(c corev1.Container) {
	const at = "/spec/initContainers"
	list := e.pod.Spec.InitContainers
	if i := sidecarIn(list); i >= 0 {
		c = keep(c, &list[i])
	}
	for i := len(list) - 1; i >= 0; i-- {
		if list[i].Name != names.Container || i == 0 && equality.Semantic.DeepEqual(list[0], c) {
			continue
		}
		if i == 0 {
			e.op("replace", at+"/0", c)
			list[0] = c
			continue
		}
		e.op("remove", at+"/"+strconv.Itoa(i), nil)
		list = slices.Delete(list, i, i+1)
	}
	switch {
	case len(list) == 0:
		e.op("add", at, []corev1.Container{c})
		list = []corev1.Container{c}
	case list[0].Name != names.Container:
		e.op("add", at+"/0", c)
		list = slices.Insert(list, 0, c)
	}
	e.pod.Spec.InitContainers = list
}

// sidecarIn is the place of the container with the sidecar's name; -1: there is none.
func sidecarIn(containers []corev1.Container) int {
	return slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == names.Container })
}

// mountable puts volumes there, in the place of those of the same name.
func (e *edit) mountable(volumes []corev1.Volume) {
	const at = "/spec/volumes"
	if len(e.pod.Spec.Volumes) == 0 {
		e.op("add", at, volumes)
		e.pod.Spec.Volumes = volumes
		return
	}
	for _, v := range volumes {
		i := slices.IndexFunc(e.pod.Spec.Volumes, func(have corev1.Volume) bool { return have.Name == v.Name })
		switch {
		case i < 0:
			e.op("add", at+"/-", v)
			e.pod.Spec.Volumes = append(e.pod.Spec.Volumes, v)
		case !equality.Semantic.DeepEqual(e.pod.Spec.Volumes[i], v):
			e.op("replace", at+"/"+strconv.Itoa(i), v)
			e.pod.Spec.Volumes[i] = v
		}
	}
}

// annotation is a key and its value.
type annotation struct{ key, value string }

func (e *edit) annotate(list ...annotation) {
	const at = "/metadata/annotations"
	slices.SortFunc(list, func(a, b annotation) int { return cmp.Compare(a.key, b.key) })
	if len(e.pod.Annotations) == 0 {
		e.pod.Annotations = map[string]string{}
		for _, a := range list {
			e.pod.Annotations[a.key] = a.value
		}
		e.op("add", at, e.pod.Annotations)
		return
	}
	for _, a := range list {
		if v, ok := e.pod.Annotations[a.key]; ok && v == a.value {
			continue
		}
		e.op("add", at+"/"+pointer.Replace(a.key), a.value)
		e.pod.Annotations[a.key] = a.value
	}
}

// pointer escapes a token of a JSON pointer (RFC 6901, section 3).
var pointer = strings.NewReplacer("~", "~0", "/", "~1")
