package source

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	sjson "sigs.k8s.io/json"
)

// listDepth is how deep Lists may hold Lists.
const listDepth = 4

// take reads one item: opens a List, reads a kind that is known, counts another one.
func (r *reader) take(it *item, depth int) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(it.json, &fields); err != nil {
		r.notKubernetes(it, "not a Kubernetes object: it is no mapping with apiVersion and kind")
		return
	}
	it.apiVersion, it.kind = cmp.Or(text(fields["apiVersion"]), it.apiVersion), cmp.Or(text(fields["kind"]), it.kind)
	var meta struct{ Namespace, Name, GenerateName string }
	if json.Unmarshal(fields["metadata"], &meta) == nil { // else the typed decoding says what is wrong
		it.namespace, it.name = meta.Namespace, cmp.Or(meta.Name, meta.GenerateName)
	}
	k, known := kinds[it.kind]
	if known && !k.clusterScoped {
		it.namespace = cmp.Or(it.namespace, r.o.Namespace)
	}
	switch {
	case it.apiVersion == "" || it.kind == "":
		r.incomplete(it, fields)
	case strings.HasSuffix(it.kind, "List") && fields["items"] != nil:
		r.takeList(it, fields["items"], depth)
	case known && it.apiVersion == k.apiVersion:
		k.read(r, it, k)
	case known && kubernetesGroup(it.apiVersion):
		r.problem(it.at("apiVersion", fmt.Sprintf("%s %s is not read", it.apiVersion, it.kind), "use apiVersion: "+k.apiVersion))
	default:
		if near := nearest(it.kind, slices.Sorted(maps.Keys(kinds))); near != "" && !known && it.apiVersion == kinds[near].apiVersion {
			r.problem(it.at("kind", fmt.Sprintf("%s has no kind %s", it.apiVersion, it.kind), "did you mean "+near+"?"))
			return
		}
		r.ignored[it.apiVersion+"/"+it.kind]++
	}
}

// kubernetesGroup tells Kubernetes' own groups, also misspelt ones, from the groups of others, which have a domain of their own.
func kubernetesGroup(apiVersion string) bool {
	group, _, ok := strings.Cut(apiVersion, "/")
	return !ok || !strings.Contains(group, ".") || strings.HasSuffix(group, ".k8s.io")
}

// incomplete deals with an item without apiVersion or kind. In a folder that is Helm values and the like, unless it looks like
// an object of which a line has been lost.
func (r *reader) incomplete(it *item, fields map[string]json.RawMessage) {
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		for _, want := range []string{"apiVersion", "kind"} {
			if name != want && strings.EqualFold(name, want) {
				r.problem(it.at(name, "unknown field", "write it as "+want))
				return
			}
		}
	}
	if k, known := kinds[it.kind]; known {
		r.problem(it.at("", "apiVersion is missing", "add apiVersion: "+k.apiVersion))
		return
	}
	if strings.Contains(it.apiVersion, "/") {
		r.problem(it.at("", "kind is missing", "add the kind"))
		return
	}
	r.notKubernetes(it, "not a Kubernetes object: apiVersion and kind are missing")
}

func (r *reader) notKubernetes(it *item, text string) {
	if it.doc.file.named || it.path != "" {
		r.problem(it.at("", text, "name only Kubernetes manifests; in a folder, other files are passed over"))
		return
	}
	r.ignored[it.doc.file.name]++
}

func (r *reader) takeList(it *item, raw json.RawMessage, depth int) {
	var items []json.RawMessage
	if err := json.Unmarshal(raw, &items); err != nil {
		r.problem(it.at("items", "not a list", "write items as a list"))
		return
	}
	if depth == 0 {
		r.problem(it.at("items", "Lists within Lists, too deep", "unpack them"))
		return
	}
	of := strings.TrimSuffix(it.kind, "List")
	for i, raw := range items {
		sub := &item{doc: it.doc, json: raw, path: strings.TrimPrefix(fmt.Sprintf("%s.items[%d]", it.path, i), ".")}
		if of != "" { // the items of a typed list need not say again what they are
			sub.apiVersion, sub.kind = it.apiVersion, of
		}
		n := len(r.problems)
		r.take(sub, depth-1)
		if of != "" && sub.kind != of && len(r.problems) == n {
			r.problem(sub.at("kind", fmt.Sprintf("%s in a %s", sub.kind, it.kind), "use kind: List for a list of several kinds"))
		}
	}
}

// reads makes the read function of a kind from what is particular to it.
func reads[T any, P interface {
	*T
	metav1.Object
}](check func(P) field.ErrorList, keep func(*reader, P)) func(*reader, *item, kind) {
	return func(r *reader, it *item, k kind) {
		o := P(new(T))
		if !r.decode(it, o) {
			return
		}
		r.origin[o] = it
		n := len(r.problems)
		if !k.clusterScoped && o.GetNamespace() == "" {
			o.SetNamespace(r.o.Namespace)
		}
		it.namespace = o.GetNamespace()
		if o.GetName() == "" && o.GetGenerateName() != "" {
			r.name(o)
		}
		r.wrongs(o, validation.ValidateObjectMetaAccessor(o, !k.clusterScoped, k.validName, field.NewPath("metadata")))
		if check != nil {
			r.wrongs(o, check(o))
		}
		if len(r.problems) > n {
			return
		}
		r.claim(o)
		keep(r, o)
		if it.kind == "NetworkPolicy" {
			r.noteNulls(it)
		}
	}
}

// noteNulls warns of lists and selectors of a policy that are written down with nothing in them: to the API they are absent, and
// an absent list of peers or ports admits all.
func (r *reader) noteNulls(it *item) {
	var o struct{ Spec any }
	if json.Unmarshal(it.json, &o) != nil {
		return
	}
	for _, path := range nulls(o.Spec, "spec") {
		r.warn("%s: %s: %s: null means the same as absent", it.placeOf(path), it.object(), path)
	}
}

func nulls(v any, path string) (out []string) {
	switch v := v.(type) {
	case nil:
		return []string{path}
	case []any:
		for i, e := range v {
			out = append(out, nulls(e, fmt.Sprintf("%s[%d]", path, i))...)
		}
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			out = append(out, nulls(v[k], path+"."+k)...)
		}
	}
	return out
}

// name gives an object with metadata.generateName a name that depends on nothing but its content; twins are counted.
func (r *reader) name(o metav1.Object) {
	b, err := json.Marshal(o)
	if err != nil { // it came from JSON
		panic(fmt.Sprintf("source: marshal object with generateName %s: %v", o.GetGenerateName(), err))
	}
	content := safeHash(b, 32)
	base := o.GetGenerateName()
	base = base[:min(len(base), 58)] // as the API server does: 63 with the suffix
	o.SetName(base + safeHash(fmt.Appendf(nil, "%s %d", content, r.twins[content]), 5))
	r.twins[content]++
}

// claim notes the name of an object, and reports it if another one has it.
func (r *reader) claim(o metav1.Object) {
	it := r.origin[o]
	key := it.kind + "/" + o.GetNamespace() + "/" + o.GetName()
	if other, ok := r.first[key]; ok {
		r.wrong(o, "", "the same object is at "+other.place()+" too", "remove one of the two")
		return
	}
	r.first[key] = it
}

// wrongs reports what a validation found.
func (r *reader) wrongs(o metav1.Object, errs field.ErrorList) {
	for _, e := range errs {
		r.wrong(o, e.Field, shorten(e.ErrorBody()), hints[e.Type])
	}
}

var hints = map[field.ErrorType]string{
	field.ErrorTypeRequired:     "add it",
	field.ErrorTypeInvalid:      "correct the value",
	field.ErrorTypeNotSupported: "use one of the values listed",
	field.ErrorTypeDuplicate:    "change one of them",
	field.ErrorTypeForbidden:    "remove or change it",
	field.ErrorTypeTooMany:      "remove some",
}

// decode reads an item into its type. Whatever the type does not know is an error, because a misspelt field would open or close
// what its author did not mean; only exports may come from a cluster that knows more.
func (r *reader) decode(it *item, into metav1.Object) bool {
	strict, err := sjson.UnmarshalStrict(it.json, into)
	var wrongType *json.UnmarshalTypeError
	switch {
	case errors.As(err, &wrongType) && wrongType.Field != "":
		found, wanted := words(wrongType.Value), words(wrongType.Type.Kind().String())
		hint := "correct the value"
		if wanted == "a string" && found != "a mapping" && found != "a list" {
			hint = "put it in quotes: to YAML, yes, no, on, off and digits are no strings"
		}
		r.problem(it.at(pathAt(it.json, wrongType.Offset), fmt.Sprintf("found %s where %s belongs", found, wanted), hint))
		return false
	case err != nil:
		r.problem(it.at("", strings.TrimPrefix(err.Error(), "json: "), "compare with `kubectl explain "+strings.ToLower(it.kind)+"`"))
		return false
	}
	n := len(r.problems)
	for _, e := range strict {
		var fe sjson.FieldError
		if !errors.As(e, &fe) {
			r.problem(it.at("", e.Error(), "correct or remove it"))
			continue
		}
		path := fe.FieldPath()
		_, name := cutLast(path, ".")
		switch {
		case strings.HasPrefix(e.Error(), "duplicate field"):
			r.problem(it.at(path, "the field is there twice", "remove one of them"))
		case it.kind == "NetworkPolicy" && path == "status": // Kubernetes 1.24 to 1.27 had one, which decided nothing
		case it.kind != "NetworkPolicy" && into.GetUID() != "": // only an API server gives a uid
			r.unknown[it.kind+": field "+indexes.ReplaceAllString(path, "[]")]++
		default:
			hint := "correct or remove it"
			if near := nearest(name, policyFields); near != "" && near != name && it.kind == "NetworkPolicy" {
				hint = "did you mean " + near + "?"
			}
			r.problem(it.at(path, "unknown field", hint))
		}
	}
	return len(r.problems) == n
}

var indexes = regexp.MustCompile(`\[\d+\]`)

// policyFields are the fields of NetworkPolicySpec and of what is in it.
var policyFields = []string{"podSelector", "namespaceSelector", "ipBlock", "cidr", "except", "ingress", "egress", "from", "to", "ports",
	"port", "endPort", "protocol", "policyTypes", "matchLabels", "matchExpressions", "operator", "values", "spec", "metadata"}
