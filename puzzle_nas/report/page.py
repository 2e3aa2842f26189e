def render_page(recipe, run, summary):
    return ""
